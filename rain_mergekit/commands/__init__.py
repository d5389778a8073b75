"""The commands of `mergekit-rain`, one module each; imported only when one is called.

Each makes one frozen options class of its command line. Used by `cli`, `api`, `auto` and `demo`; it
may use everything else.
"""
