"""Attention as the formula says it, in any precision, and the rule by which a kernel equals it."""

import torch
from kernel_cases import Case


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor,
    scale: float,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax attention of ``q [B, Hq, D]`` to the tokens in ``keep [B, Hq, S]``; rows may be empty.

    ``k, v [B, Hkv, S, D]``. Returns ``out [B, Hq, D]``, ``lse [B, Hq]``, ``logits [B, Hq, S]``.
    """
    per_kv_head = (k.shape[1], -1)
    queries = (q.to(dtype) * scale).unflatten(1, per_kv_head)
    logits = (queries @ k.to(dtype).mT).flatten(1, 2).masked_fill(~keep, -torch.inf)
    lse = logits.logsumexp(-1)
    weights = torch.where(keep, (logits - lse[..., None]).exp(), 0)
    return (weights.unflatten(1, per_kv_head) @ v.to(dtype)).flatten(1, 2), lse, logits


def assert_attends_exactly(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor,
    scale: float,
) -> None:
    """Hold ``out``, and ``lse`` unless it is None, against fp64.

    Accumulation is fp32 whatever the dtype, so half precision may cost one rounding, of the output,
    and no more; beside that, ``out`` may be off by what fp32 makes of the argument of exp, and in fp32
    by two units in the last place and twice the error of plain fp32 attention.
    """
    exact, exact_lse, _ = attention(q, k, v, keep, scale)
    assert out.dtype == q.dtype and out.shape == q.shape, f"out: {out.dtype} {out.shape}"
    assert torch.isfinite(out).all(), "out holds NaN or inf"

    rounding = logit_rounding(q, k, scale)
    precision = torch.finfo(q.dtype)
    error = (out.double() - exact).abs()
    allowed = precision.eps / 2 * (exact.abs() + precision.tiny)
    allowed += 2 * rounding * v.abs().amax().double()
    if q.dtype is torch.float32:
        plain, _, _ = attention(q, k, v, keep, scale, dtype=torch.float32)
        allowed += 2 * (plain.double() - exact).abs().amax()
        allowed += 2 * precision.eps * exact.abs().amax()
    assert (error <= allowed).all(), f"out: off by {error.amax():.3g}, allowed {allowed.amax():.3g}"

    empty = ~keep.any(-1)
    assert (out[empty] == 0).all(), "out: expected zeros where nothing is kept"
    if lse is None:
        return
    assert lse.dtype == torch.float32 and lse.shape == q.shape[:2], f"lse: {lse.dtype} {lse.shape}"
    assert torch.equal(lse.isneginf(), empty), "lse: expected -inf exactly where nothing is kept"
    lse_error = (lse.double() - exact_lse)[~empty].abs()
    assert (lse_error <= rounding + 4e-7 * exact_lse[~empty].abs()).all(), (
        f"lse: off by {lse_error.amax():.3g}"
    )


def assert_scores_are_exact(
    scores: torch.Tensor, case: Case, kind: str, *, half_distances: bool = False
) -> None:
    """Hold token scores of one kind against fp64; outside a row's range they must be -inf.

    ``half_distances``: a logit may have passed through fp16, as its distance from another of its head.
    """
    _, kv_heads, tokens, _ = case.k.shape
    _, lse, logits = attention(case.q, case.k, case.v, case.keep, case.scale)
    rounding = 2 * logit_rounding(case.q, case.k, case.scale)
    lost = torch.zeros_like(logits)
    if half_distances:
        spread = logits.amax(-1) - torch.where(case.keep, logits, torch.inf).amin(-1)
        # Half a unit in the last place.
        lost = torch.where(case.keep, 2**-11 * spread[..., None], 0)
    if kind == "query_head_logits":
        expected, allowed = logits, rounding + lost
    else:

        def of_sets(heads: torch.Tensor) -> torch.Tensor:
            return {
                "query_head": heads,
                "kv_head": heads.unflatten(1, (kv_heads, -1)).sum(2),
                "shared": heads.sum(1, keepdim=True),
            }[kind]

        probability = torch.where(case.keep, (logits - lse[..., None]).exp(), 0)
        expected = of_sets(probability)
        allowed = rounding * expected + 1e-30
        allowed += of_sets(torch.where(probability > 0, probability * lost.expm1(), 0))
    assert scores.dtype == torch.float32
    width = scores.shape[-1]
    assert scores.shape[:2] == expected.shape[:2]
    assert case.seq_lens.max() <= width <= tokens
    valid = case.valid[:, None].expand_as(expected)
    assert scores[~valid[..., :width]].isneginf().all()
    difference = (scores.double() - expected[..., :width]).abs()
    assert (difference <= allowed[..., :width])[valid[..., :width]].all()


def logit_rounding(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """What an fp32 logit may be off by: some units in the last place of the sum of ``|q * k|``."""
    sums = (q.abs().float() * scale).unflatten(1, (k.shape[1], -1)) @ k.abs().float().mT
    return 4 * torch.finfo(torch.float32).eps * (1 + sums.amax())
