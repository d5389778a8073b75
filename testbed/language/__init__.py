"""A trio of real language models, made from a small published one, and the scoreboard on it."""
