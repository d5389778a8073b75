"""The commands of `mergekit-rain`, one module each; imported only when one is called."""
