"""Samples as text and as tokens: chat templates, thinking markers, token positions.

Used by everything that reads a calibration set; it uses `system`.
"""
