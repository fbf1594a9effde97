"""Tiles fit a GPU's shared memory: with fewer pipeline stages where there is less than on an H200."""

import importlib

import pytest
import torch

pytest.importorskip("triton")

from tidaldecode.kernels.triton import _device

DENSE, SPARSE, LINEAR, CUTS = (
    importlib.import_module(f"tidaldecode.kernels.triton.{name}")
    for name in ("dense_decode", "sparse_decode", "linear", "_cuts")
)
CUDA = torch.device("cuda")
H200, A100, RTX_4090, T4 = 232_448, 166_912, 101_376, 65_536
"""Bytes of shared memory that a program may have (CUDA C++ Programming Guide, compute capabilities)."""
DIMS = (16, 32, 64, 128, 256)


def attention_tiles():
    """``(stages, bytes of a tile)`` of both attention kernels."""
    for dim in DIMS:
        for size in (2, 4):
            for rows in (16, 32, 64, 128):
                block, _, stages = DENSE._tile(dim, size, rows)
                yield stages, 2 * block * dim * size
            for tokens in (1, 64, 300, 8192):
                for per_processor in (1, 2, 3, 9):
                    block, _, stages = SPARSE._tile(dim, size, tokens, per_processor)
                    yield stages, 2 * block * dim * size


def product_tiles():
    """The same of products of several rows."""
    for rows in (8, 16, 32, 64):
        for inputs in (64, 2048, 4096, 14336):
            for outputs in (64, 2048, 4096, 6144):
                for gated in (False, True):
                    for size in (2, 4):
                        out, into, _, stages = LINEAR._tile(rows, inputs, outputs, gated, size)
                        yield stages, (out * (1 + gated) + rows) * into * size


TILES = sorted({*attention_tiles(), *product_tiles()})


@pytest.mark.parametrize("bytes_there", [H200, A100, RTX_4090, T4])
def test_what_is_on_the_way_fits(monkeypatch, bytes_there):
    monkeypatch.setattr(_device, "shared_memory", lambda _: bytes_there)
    for stages, tile in TILES:
        fitting = _device.fitting_stages(stages, tile, CUDA)
        assert 1 <= fitting <= stages
        assert fitting == 1 or (fitting - 1) * tile < bytes_there


def test_an_h200_has_room_for_all_and_a_consumer_gpu_for_two_stages(monkeypatch):
    monkeypatch.setattr(_device, "shared_memory", lambda _: H200)
    assert all(_device.fitting_stages(stages, tile, CUDA) == stages for stages, tile in TILES)
    monkeypatch.setattr(_device, "shared_memory", lambda _: RTX_4090)
    assert all(_device.fitting_stages(2, tile, CUDA) == 2 for _, tile in TILES if tile <= 1 << 16)


def test_interpreted_kernels_keep_their_stages():
    assert _device.fitting_stages(3, 1 << 30, torch.device("cpu")) == 3


@pytest.mark.parametrize(
    "heads, budget, parts",
    [
        (8, 512, 8),
        (8, 4096, 32),  # two programs a multiprocessor, each with one tile of 128
        (8, 8192, 16),  # more would be needed: one each, with several tiles
        (32, 512, 8),
        (32, 4096, 4),
        (128, 512, 1),
        (1, 1, 8),
        (0, 512, 8),
    ],
)
def test_parts_of_a_selection_on_an_h200(monkeypatch, heads, budget, parts):
    for module in (SPARSE, CUTS):
        monkeypatch.setattr(module, "processors", lambda _: 132)
    assert SPARSE._parts(heads, budget, 128, CUDA) == parts
