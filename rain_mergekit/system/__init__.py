"""Files, processes, memory and threads: nothing here knows of models.

Any other package may use it; it uses `errors` alone.
"""
