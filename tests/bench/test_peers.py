"""Peers attend to copies in pages that hold the same tokens; without a GPU there are none."""

import pytest
import torch

from tidaldecode.bench.peers import PAGE, paged, peers
from tidaldecode.kernels import dense_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 100])
def test_pages_hold_the_same_tokens(tokens):
    q = torch.randn(3, 4, 8)
    k, v = (torch.randn(3, 2, tokens, 8) for _ in "kv")
    lens = torch.full((3,), tokens, dtype=torch.int32)
    pages = -(-tokens // PAGE)
    table = torch.arange(3 * pages, dtype=torch.int32).view(3, pages)
    expected, _, _ = dense_decode(q, k, v, lens, scale=0.3)
    found, _, _ = dense_decode(q, paged(k), paged(v), lens, scale=0.3, block_table=table)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_installed_peers_agree_with_ours(batch):
    q = torch.randn(batch, 8, 128, device=DEVICE, dtype=torch.bfloat16)
    layers = [
        tuple(torch.randn(batch, 2, 1000, 128, device=DEVICE, dtype=q.dtype) for _ in "kv")
        for _ in range(2)
    ]
    lens = torch.full((batch,), 1000, dtype=torch.int32, device=DEVICE)
    found = peers(q, layers, 0.1)
    assert DEVICE == "cuda" or not found
    for attend in found.values():
        for layer, (k, v) in enumerate(layers):
            expected, _, _ = dense_decode(q, k, v, lens, scale=0.1)
            torch.testing.assert_close(attend(layer), expected, atol=2e-2, rtol=2e-2)
