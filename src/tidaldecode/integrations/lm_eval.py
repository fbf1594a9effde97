"""lm-evaluation-harness: its tasks, with every score measured on the decode path.

The harness has no way to find models of other packages, so its command is started by ours, which adds
the model ``tidaldecode`` and passes on all options::

    tidaldecode lm-eval --model tidaldecode --model_args pretrained=DIR,budget=1024 --tasks ruler

TidalDecode acts in decode steps alone. A task scored by one forward pass over prompt and answer would
therefore measure full attention, whatever the settings; here, answers are fed token by token.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from tidaldecode.config import TidalConfig
from tidaldecode.engine import Script
from tidaldecode.errors import TidalError
from tidaldecode.integrations.transformers.engine import TransformersEngine
from tidaldecode.integrations.transformers.handle import enable
from tidaldecode.integrations.transformers.loading import load_model

_OPTIONS = "pretrained method device dtype batch_size max_length question_tokens".split()
_SETTINGS = [field.name for field in dataclasses.fields(TidalConfig)]
_GREEDY = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}
_NEW_TOKENS = 256  # where a task sets no limit; the harness's own default

_log = logging.getLogger(__name__)


@register_model("tidaldecode")
class TidalLM(TemplateLM):  # type: ignore[misc]
    """A local transformers decoder as a model of the harness.

    Sequences that do not fit ``max_length`` lose tokens on the left, with a warning, as with the
    harness's own ``hf`` model.

    Args:
        pretrained: local model directory, with safetensors weights and a tokenizer.
        method: ``tidal``, or ``dense``: full attention through the same steps, for comparison.
        device: ``auto``, ``cpu``, ``cuda``, ...
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        batch_size: sequences decoded together.
        max_length: tokens of a sequence, prompt and answer; default: the model's context.
        question_tokens: last tokens of a prompt that are fed token by token before an answer is
            generated; what comes before them is prefilled with full attention.
        settings: single settings by the names of `TidalConfig`, layers as in ``2+6+7`` or ``none``;
            the others come from ``tidal_config.json`` beside the model, or are the defaults.

    Errors: `TidalError` for an unknown option, and for values or a model that cannot work.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        method: str = "tidal",
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_length: int | None = None,
        question_tokens: int = 64,
        **settings: Any,
    ) -> None:
        super().__init__()
        if unknown := sorted(settings.keys() - set(_SETTINGS)):
            raise TidalError(
                f"model_args: expected {', '.join([*_OPTIONS, *_SETTINGS])}, "
                f"got {', '.join(map(repr, unknown))}; remove or correct it"
            )
        if not pretrained:
            raise TidalError("pretrained: expected a model directory, got none; add pretrained=DIR")
        if method not in ("tidal", "dense"):
            raise TidalError(f"method: expected tidal or dense, got {method!r}")
        self.batch_size = _at_least_one("batch_size", batch_size)
        self.question_tokens = _at_least_one("question_tokens", question_tokens)
        model, self.tokenizer = load_model(str(pretrained), device=str(device), dtype=dtype)
        context = getattr(model.get_decoder().config, "max_position_embeddings", None)
        self.max_length = _at_least_one("max_length", context if max_length is None else max_length)
        if "select_layers" in settings:
            settings["select_layers"] = _layers(settings["select_layers"])
        # Also for dense: the same line with another method should not hide a mistake.
        with enable(model, **settings) as handle:
            self.config = handle.config if method == "tidal" else None
        self.engine = TransformersEngine(model)
        self._device = model.device
        ends = model.generation_config.eos_token_id
        self._ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> TidalLM:
        """Model args go before ``--device`` and ``--batch_size``, which have a value in any case."""
        given = {k: v for k, v in (additional_config or {}).items() if v is not None}
        return cls(**{**given, **arg_dict})

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """Tells caches of prompts of different tokenizers apart."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results beside the model args."""
        return {
            "method": "dense" if self.config is None else "tidal",
            "tidal_config": None if self.config is None else self.config.to_dict(),
            "question_tokens": self.question_tokens,
            "max_length": self.max_length,
            "model_dtype": str(self.engine.model.dtype),
        }

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a chat, by the model's own template."""
        ending = {"continue_final_message": not add_generation_prompt}
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt, **ending
            )
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; a text that begins with the BOS token (a chat template's) gets no second one."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows of ``max_length``: a decode step for each token."""
        owners, windows = [], []
        for index, request in enumerate(requests):
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            ):
                owners.append(index)
                windows.append((None, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for index, (score, _) in zip(owners, scores, strict=True):
            totals[index] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        groups: dict[tuple[int, ...], list[int]] = {}  # choices share the prefill of their context
        for index, (_, context, continuation) in enumerate(requests):
            groups.setdefault(self._fit(context, continuation), []).append(index)
        answers = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(groups), disable=disable_tqdm, desc="Contexts scored")
        for contexts in _batches(sorted(groups, key=len, reverse=True), self.batch_size):
            self.engine.prefill([context[:-1] or context for context in contexts])
            members = [groups[context] for context in contexts]
            for turn in range(max(map(len, members))):
                # A context without a choice left repeats its last one.
                picked = [indices[min(turn, len(indices) - 1)] for indices in members]
                scores = self._score(contexts, [requests[index][2] for index in picked])
                for index, score in zip(picked, scores, strict=True):
                    answers[index] = score
            bar.update(len(contexts))
        bar.close()
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:  # windows of a longer text have none
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _score(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[list[int]]
    ) -> list[tuple[float, bool]]:
        """Log-likelihood and greedy equality of one continuation after each prefilled context."""
        sums, greedy = [0.0] * len(contexts), [True] * len(contexts)
        scripts: list[list[int]] = []
        targets: list[list[int]] = []
        for row, (context, tokens) in enumerate(zip(contexts, continuations, strict=True)):
            if len(context) > 1:
                scripts.append([context[-1], *tokens[:-1]])
                targets.append(tokens)
                continue
            # A lone token is the whole prefill. All methods agree on what follows it, since there is
            # nothing else to attend to.
            with torch.inference_mode():
                ids = torch.tensor([list(context)], device=self._device)
                first = self.engine.model(ids).logits[0, -1].float().log_softmax(-1)
            sums[row], greedy[row] = float(first[tokens[0]]), int(first.argmax()) == tokens[0]
            scripts.append(tokens[:-1] or tokens)
            targets.append(tokens[1:])
        rows = range(len(contexts))
        for index, step in enumerate(self.engine.steps(scripts, self.config)):
            wanted = [target[index] if index < len(target) else 0 for target in targets]
            scores = step.logits.log_softmax(-1)[rows, wanted].tolist()
            for row in rows:
                if index < len(targets[row]):
                    sums[row] += scores[row]
                    greedy[row] &= step.tokens[row] == wanted[row]
        return list(zip(sums, greedy, strict=True))

    def _fit(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """The end of ``context`` that fits; the last token of a continuation is never fed."""
        room = self.max_length + 1 - len(continuation)
        if not context or not continuation or room < 1:
            raise TidalError(
                f"request: expected a context and a continuation of 1 to max_length={self.max_length} "
                f"tokens, got {len(context)} and {len(continuation)} tokens; raise max_length or "
                "leave this task out"
            )
        return tuple(_last(context, room))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to a stop string, the end of the text, or ``max_gen_toks``.

        Errors: `TidalError` for a task that asks for sampling or beams, or a prompt below 2 tokens.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        answers = [""] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Texts generated")
        for indices in groups.values():
            limit, until = _greedy_only(requests[indices[0]].args[1])
            prompts = {i: self._prompt(requests[i].args[0], limit) for i in indices}
            indices.sort(key=lambda i: len(prompts[i]), reverse=True)
            for batch in _batches(indices, self.batch_size):
                texts = self._continue([prompts[i] for i in batch], limit, until)
                for index, text in zip(batch, texts, strict=True):
                    answers[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                bar.update(len(batch))
        bar.close()
        return answers

    def _prompt(self, text: str, limit: int) -> list[int]:
        room = self.max_length - limit
        ids = _last(self.tok_encode(text), room) if room > 1 else []
        if len(ids) < 2:
            raise TidalError(
                f"prompt: expected at least 2 tokens beside max_gen_toks={limit}, got {text[:40]!r} "
                f"with max_length={self.max_length}; raise max_length or lower max_gen_toks"
            )
        return ids

    def _continue(
        self, prompts: Sequence[list[int]], limit: int, until: Sequence[str]
    ) -> list[str]:
        """Texts of at most ``limit`` tokens, without the stop string that ended them."""
        cuts = [max(1, len(prompt) - self.question_tokens) for prompt in prompts]
        questions = [prompt[cut:] for prompt, cut in zip(prompts, cuts, strict=True)]
        self.engine.prefill([prompt[:cut] for prompt, cut in zip(prompts, cuts, strict=True)])
        scripts: list[Script] = [[*question, *[None] * (limit - 1)] for question in questions]
        made: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        with closing(self.engine.steps(scripts, self.config)) as steps:  # type: ignore[type-var]
            for index, step in enumerate(steps):
                for row in [r for r in running if index >= len(questions[r]) - 1]:
                    ended = step.tokens[row] in self._ends
                    made[row] += [] if ended else [step.tokens[row]]
                    text = self.tokenizer.decode(made[row])  # stop strings can be special tokens
                    if ended or len(made[row]) == limit or any(stop in text for stop in until):
                        running.remove(row)
                if not running:
                    break
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in made]
        for stop in until:
            texts = [text.split(stop)[0] for text in texts]
        return texts


def _greedy_only(asked: dict[str, Any]) -> tuple[int, list[str]]:
    """``max_gen_toks`` and stop strings. Like the harness, reads do_sample before temperature."""
    settings = normalize_gen_kwargs(asked, _NEW_TOKENS)
    others = {k: v for k, v in settings.items() if k not in _GREEDY and (k, v) != ("num_beams", 1)}
    if settings["do_sample"] or others:
        raise TidalError(
            f"gen_kwargs: expected greedy decoding, with {', '.join(sorted(_GREEDY))} at most, got "
            f"{asked}; pass --gen_kwargs do_sample=false,temperature=0 or leave this task out"
        )
    limit = _at_least_one("max_gen_toks", settings["max_gen_toks"])
    return limit, [stop for stop in settings["until"] if stop]


def _last(ids: list[int], room: int) -> list[int]:
    if len(ids) > room:
        _log.warning("%d tokens do not fit: only the last %d are used", len(ids), room)
    return ids[-room:]


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _layers(value: Any) -> Any:
    """``2+6+7``, ``2`` and ``none`` as `TidalConfig` wants them; it checks all else itself."""
    if value in (None, "none"):
        return ()
    parts = str(value).split("+")
    return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else value


def _at_least_one(name: str, value: Any) -> int:
    if isinstance(value, bool) or not str(value).isdecimal() or int(value) < 1:
        raise TidalError(f"{name}: expected a whole number from 1 up, got {value!r}; give {name}=N")
    return int(value)


def run_harness(arguments: list[str]) -> int:
    """The harness's own command, which knows ``--model tidaldecode`` here; returns its exit code.

    Errors: `TidalError` for model args that are not known, and what a model cannot do.
    """
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["tidaldecode lm-eval", *arguments]
    try:
        cli_evaluate()
    except SystemExit as end:
        if isinstance(end.code, str):
            raise TidalError(f"lm_eval: {end.code}") from end
        return end.code or 0
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    sys.exit(
        "tidaldecode: error: expected the command tidaldecode lm-eval, which takes these options"
    )
