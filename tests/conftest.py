"""Shared by all tests: one thread, a fixed seed, and no way to a model hub."""

import importlib.util
import os
from collections.abc import Iterator

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


@pytest.fixture(scope="module", params=["torch", "auto"])
def cpu_backend(request) -> Iterator[None]:
    """PyTorch alone, and Numba's loops where they can run."""
    if request.param == "auto" and importlib.util.find_spec("numba") is None:
        pytest.skip("Numba is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIDALDECODE_BACKEND", request.param)
        yield
