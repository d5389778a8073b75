"""The precompute: from samples and models to a calibration file.

`pipeline` tells the whole story; the commands call it, nothing below does.
"""
