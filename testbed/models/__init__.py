"""Tiny models: building, loading, training, greedy answers."""
