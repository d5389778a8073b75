"""Small trained trios that show what a merge does to behaviour, not only to weights."""
