"""Shared by all tests: one thread, a fixed seed, and no way to a model hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined: the same kernels, run by NumPy.
    os.environ["TRITON_INTERPRET"] = "1"

# The tensors of the tests are small: a second thread would only be waited for.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
