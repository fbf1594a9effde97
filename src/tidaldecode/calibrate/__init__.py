"""Calibration of a model: which of its layers should select. The search itself is in `algorithm`."""

MOST_LAYERS = 4
"""Selection layers that a calibration tries at most."""
