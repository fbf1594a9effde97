"""Attach TidalDecode to a model, and take it off again without a trace.

Attaching sets the decoder's attention implementation to our registered function and puts two hooks on
the decoder: one hands every forward pass a fresh state, one checks that the layers received it.
Nothing of the model is patched or copied, and no state outlives a forward pass. A dynamic cache that
comes along grows in place from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tidaldecode.algorithm import Role
from tidaldecode.algorithm.tally import Tally
from tidaldecode.config import TidalConfig
from tidaldecode.engine import OnScores
from tidaldecode.errors import TidalError
from tidaldecode.integrations.transformers.attention import HOST, KEYWORD, NAME, Forward, register
from tidaldecode.integrations.transformers.captured_rounds import CapturedRounds
from tidaldecode.integrations.transformers.correction import Corrector
from tidaldecode.integrations.transformers.decode_step import DecodeStep
from tidaldecode.integrations.transformers.footprint import kv_reads
from tidaldecode.integrations.transformers.graph_generate import (
    can_graph,
    graph_generate,
    graphed,
    suits,
)
from tidaldecode.integrations.transformers.growing_cache import grow_in_place
from tidaldecode.integrations.transformers.lossless import lossless_generate
from tidaldecode.integrations.transformers.lossless_call import correcting, lossless
from tidaldecode.integrations.transformers.lossless_graph import captured_generate
from tidaldecode.integrations.transformers.settings import resolve_settings
from tidaldecode.integrations.transformers.speculative_steps import SpeculativeSteps
from tidaldecode.integrations.transformers.step_pool import StepPool
from tidaldecode.integrations.transformers.support import inspect_model

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PreTrainedModel

_ATTRIBUTE = "_tidal_handle"


class TidalHandle:
    """An enabled model: its configuration, its plan, and the way back. Also a context manager."""

    def __init__(
        self, model: PreTrainedModel, config: TidalConfig | None, overrides: dict[str, Any]
    ) -> None:
        decoder, self.shape = inspect_model(model)
        self.config, self.plan, self.reason = resolve_settings(model, self.shape, config, overrides)
        self.on_scores: OnScores | None = None
        """If set, sees the token scores of every selection layer of every decode step."""
        self.reads = kv_reads(model, self.config, self.plan)
        """Bytes of K and V that a sparse step reads, and full attention."""
        self.tally = Tally()
        """What lossless decoding did since `enable`."""
        self.speculative_steps: type[SpeculativeSteps] = SpeculativeSteps
        """What drafts and verifies in lossless mode, run by the host."""
        self.captured_rounds: type[CapturedRounds] = CapturedRounds
        """The same, run by the device."""
        self._model, self._decoder = model, decoder
        self._lossless = self.config.mode == "lossless"
        if self._lossless:
            self._check_layers("mode='lossless'")
        self._corrector: Corrector | None = None
        if self.config.correct_every is not None:
            self._check_layers("correct_every")
            self._corrector = Corrector(decoder, self.config, self.plan)
        self.steps = StepPool(self._make_step)
        """Decode steps for `graph_generate`."""
        self.rounds = StepPool(self._make_rounds)
        """Draft and verify steps for `graph_generate` in lossless mode."""
        self._previous = decoder.config._attn_implementation
        if self._previous != HOST:
            raise TidalError(
                f"model: expected attention implementation {HOST!r}, got {self._previous!r}; load "
                f"the model with attn_implementation={HOST!r}"
            )
        register()
        self._switch(NAME)
        self._hooks = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, with_kwargs=True),
        ]
        setattr(model, _ATTRIBUTE, self)
        route = self._route()
        self._routes = route is not None
        if route is not None:
            model.generate = route

    def disable(self) -> None:
        """Restore the model exactly as it was. Does nothing the second time."""
        if getattr(self._model, _ATTRIBUTE, None) is not self:
            return
        delattr(self._model, _ATTRIBUTE)
        self.steps.clear()
        self.rounds.clear()
        if self._routes:
            del self._model.generate
        for hook in self._hooks:
            hook.remove()
        self._switch(self._previous)

    def __enter__(self) -> TidalHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.disable()

    def __repr__(self) -> str:
        return (
            f"TidalHandle({type(self._model).__name__}, plan={self.plan}, "
            f"budget={self.config.budget}, granularity={self.config.granularity!r})"
        )

    def correct(self, cache: Cache | None = None) -> int:
        """Recompute the tokens decoded sparsely since the last correction, in place.

        Do so before a cache is stored or used by other means; a longer prompt that continues it does
        so by itself.

        Args:
            cache: the cache to correct; by default all that are alive.

        Returns:
            Tokens of a row that were recomputed, 0 where there was nothing to do.

        Errors: `TidalError` without ``correct_every``, and for a cache changed by other means.
        """
        if self._corrector is None:
            raise TidalError(
                "correct: expected a model enabled with correct_every, so that tokens to correct are "
                "known, got correct_every=None"
            )
        return self._corrector.correct(cache)

    def stats(self) -> Tally:
        """What lossless decoding did since `enable`, over all calls of ``generate``.

        Errors: `TidalError` in sparse mode, which drafts nothing.
        """
        if not self._lossless:
            raise TidalError(
                f"stats: expected a model enabled with mode='lossless', got mode={self.config.mode!r}"
            )
        total = Tally()
        total.add(self.tally)
        return total

    def _check_layers(self, what: str) -> None:
        """Errors: `TidalError` where layers of the host forget tokens that were rewritten."""
        if hosts := self.plan.layers(Role.HOST):
            raise TidalError(
                f"model: expected full attention in every layer with {what}, got layers "
                f"{', '.join(map(str, hosts))} without it, whose cache drops earlier tokens"
            )

    def _route(self) -> Callable[..., Any] | None:
        """What takes the place of ``model.generate``, or None where it stays."""
        if self._lossless:
            return lossless(self._model, self._choose_loop, (lossless_generate, graph_generate))
        if self._corrector is not None:
            return correcting(self._model)
        if self.config.cuda_graph is not False and can_graph(self._model, self):
            return graphed(self._model, self)
        return None

    def _choose_loop(self, call: dict[str, Any]) -> Callable[..., Any]:
        """The loop of a lossless ``generate``: captured rounds wherever they give the same."""
        captured = (
            self.config.cuda_graph is not False
            and self.on_scores is None
            and self.speculative_steps is SpeculativeSteps
            and call.get("position_ids") is None
            and suits(self._model, (), call)
            and can_graph(self._model, self)
        )
        return captured_generate if captured else lossless_generate

    def _make_rounds(self, batch: int, capacity: int) -> CapturedRounds:
        make = self.captured_rounds
        return make(self._model, self.config, self.plan, batch=batch, capacity=capacity)

    def _make_step(self, batch: int, capacity: int) -> DecodeStep:
        return DecodeStep(self._model, self.config, self.plan, batch=batch, capacity=capacity)

    def _switch(self, name: str) -> None:
        """Set the decoder's attention implementation, and make sure that it took."""
        problem = ""
        try:
            self._decoder.set_attn_implementation(name)
        except ValueError as error:
            problem = f": {error}"
        if self._decoder.config._attn_implementation != name:
            raise TidalError(
                f"model: expected a model on transformers' attention interface, but "
                f"{type(self._decoder).__name__} cannot change its attention implementation{problem}"
            )

    def _before(
        self, decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if kwargs.get("output_attentions") or self._decoder.config.output_attentions:
            raise TidalError(
                "output_attentions: expected False, since sparse layers never form the whole matrix "
                "of attention weights, got True; call disable(model) to look at attention weights"
            )
        grow_in_place(kwargs.get("past_key_values"))
        forward = kwargs.get(KEYWORD)
        if forward is None:
            # In lossless mode only a verified draft may be sparse.
            forward = Forward(self.config, self.plan, self.on_scores, dense=self._lossless)
            if self._corrector is not None:
                self._corrector.before(args, kwargs)
        return args, {**kwargs, KEYWORD: forward}

    def _after(
        self,
        decoder: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        if not kwargs[KEYWORD].reached:
            raise TidalError(
                f"model: expected the layers of {type(decoder).__name__} to call the registered "
                "attention function, but none did; this model cannot be supported"
            )
        if self._corrector is not None and not kwargs[KEYWORD].dense:
            self._corrector.after(args, kwargs, kwargs[KEYWORD])


def enable(
    model: PreTrainedModel, config: TidalConfig | None = None, **overrides: Any
) -> TidalHandle:
    """Make ``model`` decode with TidalDecode; ``model.generate`` then works as always.

    Args:
        model: a transformers decoder, loaded with ``attn_implementation="sdpa"`` (the default).
        config: the settings; by default ``tidal_config.json`` beside the model, else the defaults.
        overrides: single settings, by the names of `TidalConfig`, for instance ``budget=512``.

    Returns:
        A handle; as a context manager it disables on exit, also after an exception.

    Errors: `TidalError` for a model or option that is not supported, or a model enabled already. The
    model is unchanged then.
    """
    if getattr(model, _ATTRIBUTE, None) is not None:
        raise TidalError(
            "model: expected one without TidalDecode, got one that is enabled already; call "
            "tidaldecode.disable(model) first"
        )
    return TidalHandle(model, config, overrides)


def disable(model: PreTrainedModel) -> None:
    """Restore ``model`` exactly as it was before `enable`. Does nothing if it is not enabled."""
    handle = getattr(model, _ATTRIBUTE, None)
    if handle is not None:
        handle.disable()


def enabled_handle(model: PreTrainedModel) -> TidalHandle:
    """The handle of an enabled model. Errors: `TidalError` if it is not enabled."""
    handle = getattr(model, _ATTRIBUTE, None)
    if not isinstance(handle, TidalHandle):
        raise TidalError(
            "model: expected one with TidalDecode, got one that is not enabled; call "
            "tidaldecode.enable(model) first"
        )
    return handle
