"""How long is waited for what may never end: so long that no busy machine comes near it."""

HANGS = 3600.0  # seconds
