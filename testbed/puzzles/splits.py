"""Which split a chain belongs to, decided by a hash of the chain alone.

The same chain with another wording, another thing or another constraint stays in its split, so no
validation or test chain can have been trained on in any dress.
"""

import hashlib

SHARES = (("train", 80), ("calibration", 85), ("validation", 92), ("test", 100))


def split_of(key: str, seed: int) -> str:
    """The split of a chain under a seed."""
    bucket = int(hashlib.sha256(f"{seed}|{key}".encode()).hexdigest(), 16) % 100
    return next(name for name, end in SHARES if bucket < end)
