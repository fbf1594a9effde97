"""The pass over a compiled step: fewer calls, the same tokens; what does not fit stays as it was."""

from __future__ import annotations

import operator

import pytest
import torch
from passes import compiled_tokens, found_and_expected
from tiny import build, prompt

LINEAR = torch.ops.tidaldecode.linear.default
# Products of a layer in the model, and calls that are left: what shares an input, o, and down.
PRODUCTS = {"Llama": 7, "Qwen3": 7, "Qwen2": 7, "Phi3": 4, "Gemma3": 7, "Granite": 7}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", PRODUCTS)
def test_products_are_fused_and_give_the_same_tokens(family, rows, monkeypatch):
    model = build(family).half()
    ids = torch.cat([prompt(24, seed=row) for row in range(rows)])
    (plain, fused), before, after = compiled_tokens(monkeypatch, model, ids)
    # A bias is added after rounding: in half precision later tokens may differ.
    same = 30 if family == "Qwen2" else None
    assert torch.equal(plain[:, :same], fused[:, :same])
    layers = model.config.num_hidden_layers
    assert before.count(torch.nn.functional.linear) == PRODUCTS[family] * layers + 1
    assert after.count(torch.nn.functional.linear) == 0
    assert after.count(LINEAR) == 4 * layers + 1


def test_norm_gate_and_residual_of_a_llama_go_with_its_products(monkeypatch):
    model = build("Llama").half()
    layers = model.config.num_hidden_layers
    _, before, after = compiled_tokens(monkeypatch, model, prompt(24))
    assert before.count(torch.rsqrt) == 2 * layers + 1 and after.count(torch.rsqrt) == 0
    assert before.count(torch.nn.functional.silu) == layers
    assert torch.nn.functional.silu not in after
    # Two epsilons, two residuals and two rotations a layer; the epsilon of the last norm.
    assert before.count(operator.add) - after.count(operator.add) == 6 * layers + 1


def test_full_precision_is_left_to_the_compiler(monkeypatch):
    model = build("Llama")
    (plain, fused), before, after = compiled_tokens(monkeypatch, model, prompt(24))
    assert torch.equal(plain, fused) and LINEAR not in after
    for target in (torch.nn.functional.linear, torch.rsqrt, operator.add):
        assert before.count(target) == after.count(target)


class Block(torch.nn.Module):
    """A gate whose parts somebody else reads, a sum of another shape, a norm of another form."""

    def __init__(self, variant):
        super().__init__()
        self.variant = variant
        self.gate, self.up = (torch.nn.Linear(16, 8, bias=False) for _ in "gu")
        self.gain = torch.nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x):
        if self.variant in ("power", "axis", "eps first", "plain gain"):
            wide = x.to(torch.float32)
            power, axis = (3, -1) if self.variant == "power" else (2, -1)
            square = wide.pow(power).mean(0 if self.variant == "axis" else axis, keepdim=True)
            shifted = 1e-3 + square if self.variant == "eps first" else square + 1e-3
            normed = (wide * torch.rsqrt(shifted)).to(x.dtype)
            x = normed if self.variant == "plain gain" else self.gain * normed
        if self.variant == "in place":
            first = self.gate(x)
            x.mul_(2)
            return first + self.up(x)
        if self.variant == "in place operator":
            first = self.gate(x)
            x *= 2
            return first + self.up(x)
        if self.variant == "broadcast sum":
            return self.gate(x) + torch.ones(8, dtype=x.dtype)
        gate, up = self.gate(x), self.up(x)
        if self.variant == "gelu":
            return torch.nn.functional.gelu(gate) * up
        if self.variant == "gate read twice":
            return torch.nn.functional.silu(gate) * up + gate
        return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize(
    "variant",
    [
        "as in a Llama", "power", "axis", "eps first", "plain gain", "in place",
        "in place operator", "gelu",
        "gate read twice", "broadcast sum",
    ],
)  # fmt: skip
def test_only_the_exact_form_is_taken(variant):
    block = Block(variant).half()
    x = torch.rand(2 if variant == "broadcast sum" else 1, 16, dtype=torch.float16)
    (found, expected), _ = found_and_expected(block, x)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
