"""Checkpoints and what transformers and mergekit know of them.

Tensors, fingerprints, tokenizers, names in a merge, empty models, attention, experts, generation.
Used from `capture` upwards; it uses `config` and below.
"""
