"""Plain weights from quantised ones: formulas, what each tensor is made of, and the new folder.

Nothing here knows of merges; formats are named in `rain_mergekit.models.published_format`. Used by
the command `dequantize`; it uses `models`, `calibration_file` for the container, and below.
"""
