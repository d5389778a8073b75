"""Building calibration sets from a model's own answers: behind `mergekit-rain data`."""
