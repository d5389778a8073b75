"""The calibration file: its container, its schema, reading and writing it.

The only contract between a calibration and a merge: both sides use this package and do not import
each other.
"""
