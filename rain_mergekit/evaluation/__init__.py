"""Measuring a merge: drift of the thinking, moved weights, answers.

Used by the report and the commands.
"""
