"""The tasks of the trios: problems, answer formats, samples, splits, tokenizers."""
