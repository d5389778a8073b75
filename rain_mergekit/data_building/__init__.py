"""Building calibration sets from a model's own answers: behind `mergekit-rain data`.

Used by `evaluation`, the commands and `auto`; it uses `instructions` and below.
"""
