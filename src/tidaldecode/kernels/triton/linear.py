"""linear in Triton: the weights stream through once, the first of them ahead of the input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from tidaldecode.kernels.linear import MAX_WEIGHTS
from tidaldecode.kernels.triton._device import fitting_stages
from tidaldecode.kernels.triton._overlap import overlap, wait_for_predecessor


@triton.jit
def _linear_kernel(
    x, weight_0, weight_1, weight_2, gain, residual, out,
    outputs_0, outputs_1, outputs_2, batch, eps,
    x_row, x_channel, residual_row, residual_channel, out_row,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program, ``BLOCK_OUT`` outputs of one weight (of two where gated) for all rows."""
    tile = tl.program_id(0)
    weight, outputs, column = weight_0, outputs_0, 0
    if not GATED:
        tiles_0, tiles_1 = tl.cdiv(outputs_0, BLOCK_OUT), tl.cdiv(outputs_1, BLOCK_OUT)
        if tile >= tiles_0 + tiles_1:
            weight, outputs, column = weight_2, outputs_2, outputs_0 + outputs_1
            tile -= tiles_0 + tiles_1
        elif tile >= tiles_0:
            weight, outputs, column = weight_1, outputs_1, outputs_0
            tile -= tiles_0
    output = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    there = output < outputs
    offset = tl.where(there, output, 0).to(tl.int64)[:, None] * INPUTS
    row = tl.arange(0, ROWS)
    if ROWS == 1:
        result, other = _one_row(
            x, weight + offset, weight_1 + offset, gain, eps, x_channel,
            INPUTS, BLOCK_OUT, BLOCK_IN, NORM, GATED, OVERLAP,
        )  # fmt: skip
    else:
        result, other = _several_rows(
            x, weight + offset, weight_1 + offset, row, batch, x_row, x_channel,
            INPUTS, ROWS, BLOCK_OUT, BLOCK_IN, GATED, OVERLAP,
        )  # fmt: skip
    if GATED:
        result = result * tl.sigmoid(result) * other
    kept = (row < batch)[:, None] & there[None, :]
    at = column + output
    if RESIDUAL:
        source = residual + row[:, None] * residual_row + at[None, :] * residual_channel
        result += tl.load(source, mask=kept, other=0.0).to(tl.float32)
    target = out + row[:, None] * out_row + at[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=kept)


@triton.jit
def _one_row(
    x, at, other_at, gain, eps, x_channel,
    INPUTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Products ``[1, BLOCK_OUT]`` of a row with one weight, and with the other where gated."""
    rounds: tl.constexpr = (INPUTS + BLOCK_IN - 1) // BLOCK_IN
    channel = tl.arange(0, BLOCK_IN)
    inside = (channel < INPUTS)[None, :]
    # No kernel writes weights: the first may be read before the predecessor has ended.
    ahead = tl.load(at + channel[None, :], mask=inside, other=0.0)
    other_ahead = ahead
    if GATED:
        other_ahead = tl.load(other_at + channel[None, :], mask=inside, other=0.0)
    wait_for_predecessor(OVERLAP)
    sums = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    other_sums = sums
    squares = tl.zeros([BLOCK_IN], tl.float32)
    for step in range(rounds):
        now = step * BLOCK_IN + channel
        block, other_block = ahead, other_ahead
        if rounds > 1:
            further = now + BLOCK_IN
            inside = (further < INPUTS)[None, :]
            ahead = tl.load(at + further[None, :], mask=inside, other=0.0)
            if GATED:
                other_ahead = tl.load(other_at + further[None, :], mask=inside, other=0.0)
        value = tl.load(x + now * x_channel, mask=now < INPUTS, other=0.0).to(tl.float32)
        if NORM:
            squares += value * value
            value *= tl.load(gain + now, mask=now < INPUTS, other=0.0).to(tl.float32)
        sums += block.to(tl.float32) * value[None, :]
        if GATED:
            other_sums += other_block.to(tl.float32) * value[None, :]
    scale = tl.rsqrt(tl.sum(squares) / INPUTS + eps) if NORM else 1.0
    return (tl.sum(sums, 1) * scale)[None, :], (tl.sum(other_sums, 1) * scale)[None, :]


@triton.jit
def _several_rows(
    x, at, other_at, row, batch, x_row, x_channel,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Products ``[ROWS, BLOCK_OUT]`` with one weight, and with the other where gated."""
    wait_for_predecessor(OVERLAP)
    channel = tl.arange(0, BLOCK_IN)
    rows = (row < batch)[:, None]
    # The hardware multiplies by at least 16 of one side and 8 of the other: the few are the rows.
    sums = tl.zeros([BLOCK_OUT, ROWS], tl.float32)
    other_sums = sums
    for first in range(0, INPUTS, BLOCK_IN):
        now = first + channel
        inside = (now < INPUTS)[None, :]
        block = tl.load(at + now[None, :], mask=inside, other=0.0)
        source = x + row[:, None] * x_row + now[None, :] * x_channel
        value = tl.trans(tl.load(source, mask=rows & inside, other=0.0))
        sums = tl.dot(block, value, sums, input_precision="ieee")
        if GATED:
            block = tl.load(other_at + now[None, :], mask=inside, other=0.0)
            other_sums = tl.dot(block, value, other_sums, input_precision="ieee")
    return tl.trans(sums), tl.trans(other_sums)


def linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    gain: torch.Tensor | None,
    eps: float,
    gated: bool,
    residual: torch.Tensor | None,
    outputs: int,
) -> torch.Tensor:
    """Twin of `tidaldecode.kernels.linear`; ``outputs``: columns of the result."""
    batch, inputs = x.shape
    out = torch.empty(batch, outputs, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = 1 if batch == 1 else max(8, triton.next_power_of_2(batch))
    block_out, block_in, warps, stages = _tile(rows, inputs, outputs, gated, x.element_size())
    tile_bytes = (block_out * (1 + gated) + rows) * block_in * x.element_size()
    sizes = [outputs] if gated else [weight.shape[0] for weight in weights]
    missing = MAX_WEIGHTS - len(weights)
    sources = [*weights, *[weights[0]] * missing]
    _linear_kernel[(sum(triton.cdiv(size, block_out) for size in sizes),)](
        x, *sources, x if gain is None else gain.contiguous(), x if residual is None else residual,
        out, *sizes, *[0] * (MAX_WEIGHTS - len(sizes)), batch, eps,
        *x.stride(), *((0, 0) if residual is None else residual.stride()), out.stride(0),
        ROWS=rows,
        INPUTS=inputs,
        BLOCK_OUT=block_out,
        BLOCK_IN=block_in,
        NORM=gain is not None,
        GATED=gated,
        RESIDUAL=residual is not None,
        num_warps=warps,
        num_stages=fitting_stages(stages, tile_bytes, x.device),
        **overlap(x.device),
    )  # fmt: skip
    return out


def _tile(
    rows: int, inputs: int, outputs: int, gated: bool, element_size: int
) -> tuple[int, int, int, int]:
    """``(outputs of a program, inputs of a tile, warps, stages)``.

    One row: the best of 7 to 13 tiles on an H200. Several: measured in whole layers, with rotation and
    attention between the products; how a launch spreads over the GPU depends on what precedes it.
    """
    if rows == 1:
        if inputs > 4096:
            return 8, 512, 8, 1
        whole = max(128, triton.next_power_of_2(inputs))
        if gated:
            return 1, whole, 4, 1
        return (2, whole, 4, 1) if outputs > 4096 else (2, min(whole, 2048), 4, 1)
    line = 128 // element_size
    if rows > 32:
        if inputs > 4096 and not gated:
            return 32, 8 * line, 4, 3
        return 64, 2 * line, 4, 3 if gated else 4
    if gated:
        return 32, 2 * line, 2, 3
    if inputs > 4096:
        if rows == 8:
            return (32, 8 * line, 4, 4) if outputs >= 4096 else (16, 8 * line, 2, 4)
        return (16, 4 * line, 2, 6) if rows == 16 else (32, 4 * line, 2, 5)
    if outputs > 4096:
        return 32, 4 * line, 2, 4
    if rows == 8:
        return (32, 4 * line, 2, 5) if outputs == 4096 else (16, 4 * line, 2, 4)
    return (16, 4 * line, 2, 6) if rows == 16 else (32, 4 * line, 2, 5)
