"""What the merge methods that apply a calibration file are called in YAML."""

RAIN, REGMEAN, AIM = "rain", "regmean", "aim"
CALIBRATED = (RAIN, REGMEAN, AIM)
