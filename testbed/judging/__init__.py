"""Scores, divergence and intervals of what a model answers."""
