"""The kernels' Triton twins, under the same names; imported only once dispatch has chosen them."""
