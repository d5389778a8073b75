"""The HTML report, its figures, and the model card.

Used by the commands alone. `page` and `figures` need matplotlib, which is an extra: the command
asks `require_matplotlib` before it imports them.
"""
