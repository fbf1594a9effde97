"""The kernels of a decode step: tensors in, tensors out; they know no layer, plan or model.

Dimensions, here and everywhere in the package: ``B`` sequences, ``S`` cached tokens, ``Hq``/``Hkv``
query/KV heads, ``G = Hq / Hkv``, ``D`` head dimension, ``N`` selected tokens (the budget) and ``R``
selected sets per sequence (1, ``Hkv`` or ``Hq``).

The contract that the kernels share (checked once, in `tidaldecode.kernels.contract`):

- ``q [B, Hq, D]``: one query per sequence, RoPE applied (`rotate_append` does that). fp32, fp16 or
  bf16; accumulation is fp32.
- ``k, v``: strided views ``[B, Hkv, S_max, D]``; or, with ``block_table [B, max_blocks]`` int32,
  paged views ``[num_blocks, block_size, Hkv, D]``. Strides are honoured; nothing is copied whole.
- ``seq_lens [B]`` int32: the end of each row. ``starts [B]`` int32 or None: its first valid position
  (left padding). Row ``b`` holds the positions ``starts[b] <= p < seq_lens[b]``; an empty row gives
  zeros and a log-sum-exp of -inf. What memory holds outside that range never reaches an output.
- ``scale`` multiplies ``q . k`` before the softmax.
- `dense_decode` also takes the ``T`` newest queries of every row, ``[B, T, Hq, D]``.
- Outputs: ``out [B, Hq, D]`` in q's dtype, ``lse [B, Hq]`` fp32 (natural logarithm).
"""

from tidaldecode.kernels.append_token import append_token
from tidaldecode.kernels.contract import ScoreKind
from tidaldecode.kernels.dense_decode import dense_decode
from tidaldecode.kernels.dense_output import dense_output
from tidaldecode.kernels.dense_select import dense_select
from tidaldecode.kernels.linear import linear
from tidaldecode.kernels.page_bounds import page_bound_scores
from tidaldecode.kernels.rms_norm import rms_norm
from tidaldecode.kernels.rotate_append import rotate_append
from tidaldecode.kernels.select_tokens import Selection, select_tokens
from tidaldecode.kernels.sparse_decode import sparse_decode

__all__ = [
    "ScoreKind",
    "Selection",
    "append_token",
    "dense_decode",
    "dense_output",
    "dense_select",
    "linear",
    "page_bound_scores",
    "rms_norm",
    "rotate_append",
    "select_tokens",
    "sparse_decode",
]
