"""H-RAD, the paper's learned predictor of how much will be accepted."""
