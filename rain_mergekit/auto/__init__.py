"""`mergekit-rain auto`: from the names of two or three models to a merge that is measured.

Beside the demo at the top of the package: it composes what the commands are made of.
"""
