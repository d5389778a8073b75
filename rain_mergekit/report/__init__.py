"""The HTML report, its figures, and the model card.

Used by the commands alone.
"""
