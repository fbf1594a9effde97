"""Shared by all tests: one thread, a fixed seed, and no way to a model hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

# The tensors of the tests are small: a second thread would only be waited for.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
