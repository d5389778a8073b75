"""`mergekit-rain demo`: the whole job on a small trained trio, offline.

The top of the package: it may use all of it, and only the command line uses it.
"""
