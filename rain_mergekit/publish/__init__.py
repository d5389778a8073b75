"""A merge that others can use and make again: what was done, and putting it on the hub.

Used by the commands and by `auto`.
"""
