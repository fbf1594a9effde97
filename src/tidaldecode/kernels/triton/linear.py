"""linear in Triton: the weights stream through once, the first of them ahead of the input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from tidaldecode.kernels.linear import MAX_WEIGHTS
from tidaldecode.kernels.triton._overlap import overlap, wait_for_predecessor


@triton.jit
def _linear_kernel(
    x, weight_0, weight_1, weight_2, out, outputs_0, outputs_1, outputs_2, inputs, batch,
    x_row, x_channel, out_row,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program, ``BLOCK_OUT`` outputs of one weight for all rows."""
    tile = tl.program_id(0)
    tiles_0, tiles_1 = tl.cdiv(outputs_0, BLOCK_OUT), tl.cdiv(outputs_1, BLOCK_OUT)
    weight, outputs, column = weight_0, outputs_0, 0
    if tile >= tiles_0 + tiles_1:
        weight, outputs, column = weight_2, outputs_2, outputs_0 + outputs_1
        tile -= tiles_0 + tiles_1
    elif tile >= tiles_0:
        weight, outputs, column = weight_1, outputs_1, outputs_0
        tile -= tiles_0
    output = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    there = output < outputs
    at = weight + tl.where(there, output, 0).to(tl.int64)[:, None] * inputs
    channel = tl.arange(0, BLOCK_IN)
    if ROWS == 1:
        # No kernel writes weights: the first may be read before the predecessor has ended.
        ahead = tl.load(at + channel[None, :], mask=channel[None, :] < inputs, other=0.0)
        wait_for_predecessor(OVERLAP)
        acc = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
        for first in range(0, inputs, BLOCK_IN):
            block = ahead
            further = first + BLOCK_IN + channel
            ahead = tl.load(at + further[None, :], mask=further[None, :] < inputs, other=0.0)
            now = first + channel
            value = tl.load(x + now * x_channel, mask=now < inputs, other=0.0)
            acc += block.to(tl.float32) * value.to(tl.float32)[None, :]
        total = tl.sum(acc, 1).to(out.dtype.element_ty)
        tl.store(out + column + output, total, mask=there)
    else:
        wait_for_predecessor(OVERLAP)
        row = tl.arange(0, ROWS)
        rows = row < batch
        sums = tl.zeros([ROWS, BLOCK_OUT], tl.float32)
        for first in range(0, inputs, BLOCK_IN):
            now = first + channel
            inside = now < inputs
            block = tl.load(at + now[None, :], mask=inside[None, :], other=0.0)
            value = tl.load(
                x + row[:, None] * x_row + now[None, :] * x_channel,
                mask=rows[:, None] & inside[None, :],
                other=0.0,
            )
            sums = tl.dot(value, tl.trans(block), sums, input_precision="ieee")
        tl.store(
            out + row[:, None] * out_row + column + output[None, :],
            sums.to(out.dtype.element_ty),
            mask=rows[:, None] & there[None, :],
        )


def linear(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Twin of `tidaldecode.kernels.linear`."""
    batch, inputs = x.shape
    sizes = [weight.shape[0] for weight in weights]
    out = torch.empty(batch, sum(sizes), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = 1 if batch == 1 else max(16, triton.next_power_of_2(batch))
    block_out, block_in, warps, stages = _tile(rows, inputs, out.shape[1], x.element_size())
    missing = MAX_WEIGHTS - len(sizes)
    sources = [*weights, *[weights[0]] * missing]
    _linear_kernel[(sum(triton.cdiv(size, block_out) for size in sizes),)](
        x, *sources, out, *sizes, *[0] * missing, inputs, batch,
        *x.stride(), out.stride(0),
        ROWS=rows,
        BLOCK_OUT=block_out,
        BLOCK_IN=block_in,
        num_warps=warps,
        num_stages=stages,
        **overlap(x.device),
    )  # fmt: skip
    return out


def _tile(rows: int, inputs: int, outputs: int, element_size: int) -> tuple[int, int, int, int]:
    """``(outputs of a program, inputs of a tile, warps, stages)``: the best of ten on an H200."""
    if rows == 1:
        if inputs <= 4096:
            return 1, max(128, triton.next_power_of_2(inputs)), 4, 1
        return 8, 512, 8, 1
    block_in = 512 // element_size
    return (32, block_in, 4, 3) if outputs >= 8192 else (16, block_in, 2, 4)
