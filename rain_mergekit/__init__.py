"""RAIN-Merging for mergekit: calibrate with `mergekit-rain`, merge with `mergekit-yaml`.

Only the version lives here. Processes that merely find this package must not pay for it, so every
import is left to the modules that need it.
"""

__version__ = "0.1.0"
