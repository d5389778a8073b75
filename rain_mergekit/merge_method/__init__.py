"""`merge_method: rain` as mergekit sees it: from a calibration file to merged tensors.

mergekit imports `method` through the entry point; it does not use `calibration`.
"""
