"""The norms of a compiled step: one operator each, whoever reads it; other forms stay as they were."""

from __future__ import annotations

import pytest
import torch
from passes import compiled_tokens, found_and_expected
from tiny import build, prompt

NORM = torch.ops.tidaldecode.rms_norm.default
LINEAR = torch.ops.tidaldecode.linear.default
# Norms before products in a layer, all norms, and those that stay: of another form.
NORMS = {
    "Llama": (2, 2, 0),
    "Qwen3": (2, 4, 0),  # two of heads, which go with their rotation
    "Phi3": (2, 2, 0),
    "Gemma3": (0, 6, 6),
    "Granite": (2, 2, 0),
}


@pytest.mark.parametrize("family", NORMS)
def test_several_rows_share_one_norm_of_their_products(family, monkeypatch):
    model = build(family).half()
    ids = torch.cat([prompt(24, seed=row) for row in range(3)])
    (plain, fused), before, after = compiled_tokens(monkeypatch, model, ids)
    assert torch.equal(plain, fused)
    layers = model.config.num_hidden_layers
    taken, all_norms, left = (count * layers for count in NORMS[family])
    # The model's last norm is of the same form as its first.
    last = int(taken > 0)
    assert before.count(torch.rsqrt) == all_norms + 1
    assert after.count(NORM) == taken + last
    assert after.count(torch.rsqrt) == left + 1 - last


def test_one_row_is_normalised_inside_its_products(monkeypatch):
    _, _, after = compiled_tokens(monkeypatch, build("Llama").half(), prompt(24))
    assert NORM not in after and torch.rsqrt not in after


class Block(torch.nn.Module):
    """A norm of Llama's form before two products, or nearly."""

    def __init__(self, variant):
        super().__init__()
        self.variant = variant
        self.first, self.second = (torch.nn.Linear(16, 8, bias=False) for _ in "ab")
        self.gain = torch.nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x):
        variant = self.variant
        power = 4 if variant == "power" else 2
        axis = 0 if variant == "axis" else -1
        wide = x.to(torch.float32)
        square = wide.pow(power).mean(axis, keepdim=True)
        if variant == "input changed in place":
            x.mul_(3)
        if variant == "fp32 changed in place":
            wide.mul_(3)
        shifted = 1e-3 + square if variant == "eps first" else square + 1e-3
        normed = wide * torch.rsqrt(shifted)
        if variant == "gain first":
            out = (normed * self.gain.to(torch.float32)).to(x.dtype)
        elif variant == "gain that the step computes":
            out = (1 + self.gain) * normed.to(x.dtype)
        elif variant == "gain last":
            out = normed.to(x.dtype) * self.gain
        else:
            out = self.gain * normed.to(x.dtype)
        if variant == "sliced":
            out = out[:, 0:, :]
        if variant == "cut":
            out = out[:, 1:, :]
        first, second = self.first(out), self.second(out)
        if variant == "input changed later":
            x.mul_(3)
        if variant == "also read elsewhere":
            return first * second + out.sum() + x.sum() + wide.sum()
        return first * second + x.sum()


TAKEN = ["as in a Llama", "also read elsewhere", "sliced"]
LEFT = [
    "power", "axis", "eps first", "gain first", "gain last", "gain that the step computes", "cut",
    "input changed in place", "input changed later", "fp32 changed in place",
]  # fmt: skip


@pytest.mark.parametrize("rows", [1, 2, 64])
@pytest.mark.parametrize("variant", TAKEN + LEFT)
def test_only_the_exact_form_is_taken(variant, rows):
    torch.manual_seed(0)
    x = torch.rand(rows // 2 or 1, 2 if rows > 1 or variant == "cut" else 1, 16).half()
    (found, expected), after = found_and_expected(Block(variant).half(), x)
    torch.testing.assert_close(found, expected, rtol=4e-3, atol=4e-3)
    alone = rows > 1 or variant == "also read elsewhere"
    assert after.count(NORM) == (variant in TAKEN and alone)
    assert LINEAR in after


def test_a_norm_that_no_product_reads_is_left_to_the_compiler():
    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.rand(16))

        def forward(self, x):
            wide = x.to(torch.float32)
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-3)
            return self.gain * wide.to(x.dtype)

    (found, expected), after = found_and_expected(Norm().half(), torch.rand(2, 16).half())
    assert torch.equal(found, expected) and NORM not in after


def test_more_rows_than_the_products_take_are_left_to_the_compiler():
    x = torch.rand(65, 1, 16).half()
    (found, expected), after = found_and_expected(Block("as in a Llama").half(), x)
    assert torch.equal(found, expected) and NORM not in after and LINEAR not in after
