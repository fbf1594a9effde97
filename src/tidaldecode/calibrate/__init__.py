"""Calibration of a model: which of its layers should select. The search itself is in `algorithm`."""
