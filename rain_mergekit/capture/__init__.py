"""Running a model layer by layer and recording what its weights receive.

Used by `checks`, `calibration` and `evaluation`.
"""
