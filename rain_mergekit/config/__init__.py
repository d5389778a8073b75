"""The YAML file: the three models' roles, the settings and mergekit's own parameters.

Used from `calibration` upwards; it uses `text` (the markers) and below.
"""
