"""Benchmarks: real selections, whole steps, ratios from one run."""
