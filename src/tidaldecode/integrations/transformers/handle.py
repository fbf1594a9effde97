"""Attach TidalDecode to a model, and take it off again without a trace.

Attaching sets the decoder's attention implementation to our registered function and puts two hooks on
the decoder: one hands every forward pass a fresh state, one checks that the layers received it.
Nothing of the model is patched or copied, and no state outlives a forward pass.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from tidaldecode.config import TidalConfig
from tidaldecode.engine import OnScores
from tidaldecode.errors import TidalError
from tidaldecode.integrations.transformers.attention import HOST, KEYWORD, NAME, Forward, register
from tidaldecode.integrations.transformers.decode_step import DecodeStep
from tidaldecode.integrations.transformers.graph_generate import can_graph, graphed
from tidaldecode.integrations.transformers.settings import resolve_settings
from tidaldecode.integrations.transformers.step_pool import StepPool
from tidaldecode.integrations.transformers.support import inspect_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

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
        self._model, self._decoder = model, decoder
        self.steps = StepPool(self._make_step)
        """Decode steps for `graph_generate`."""
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
        self._routes = self.config.cuda_graph is not False and can_graph(model, self)
        if self._routes:
            model.generate = graphed(model, self)

    def disable(self) -> None:
        """Restore the model exactly as it was. Does nothing the second time."""
        if getattr(self._model, _ATTRIBUTE, None) is not self:
            return
        delattr(self._model, _ATTRIBUTE)
        self.steps.clear()
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
        forward = kwargs.get(KEYWORD) or Forward(self.config, self.plan, self.on_scores)
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
