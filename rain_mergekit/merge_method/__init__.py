"""The merge methods as mergekit sees them: `rain`, from a calibration file to merged tensors.

Beside it, one file each, the methods that it is compared with (`companion` is what they share).
mergekit imports `method` through the entry point; it does not use `calibration`.
"""

# Whichever module of this package comes first, mergekit's registry is complete before it.
import mergekit.merge_methods.base  # noqa: F401
