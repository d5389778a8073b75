"""Sanity checks before a calibration: do the three models, the markers and the sets fit?

Used by `calibration` and the commands.
"""
