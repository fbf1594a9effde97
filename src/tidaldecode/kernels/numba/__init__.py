"""The attention of the PyTorch path in loops that Numba compiles: fp32 on a CPU, one query a row."""
