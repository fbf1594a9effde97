"""Train a small Llama that answers needle questions: the embedded model, or a larger one.

    python training/train.py --output OUT               # about 6 minutes on one H200
    python training/train.py --output OUT --size 29M --english FILE --seconds 470
    python training/train.py --output OUT --seconds 20 --threads 2 --megabytes 4 \\
        --tokens-per-step 2048 --contexts 512,1024 --samples 4          # a smoke test on a CPU
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from batches import ANSWER, LOSS_WEIGHTS, SOURCE, Batch, Composer
from corpus import (
    collect_sources,
    encode_texts,
    line_break_tokens,
    read_english,
    repeat_to_share,
    train_tokenizer,
)
from evaluation import held_out_haystack, language_model_loss, needle_accuracy, needle_samples
from model import SIZES, VOCABULARY, build_model, hidden_states
from optimiser import MuonAdamW
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

STAGE_SHARES = (0.18, 0.12, 0.25, 0.45)
"""Share of the training time for each of four contexts, shortest first."""
WARM_UP = 0.02
"""Share of the training time in which the learning rate rises."""
LOG_EVERY = 20
PREFETCH = 6
"""Batches composed ahead of the step that uses them."""
DISTRACTORS = 8
LOSS_CONTEXT, LOSS_WINDOWS = 4096, 32
SHARD = "15900KB"
"""Largest weights file: the embedded model is one file, and larger ones travel in pieces."""


@dataclass(frozen=True)
class Options:
    """The command line; see ``--help``."""

    output: Path
    overwrite: bool
    size: str
    english: Path | None
    english_share: float
    seconds: float
    seed: int
    megabytes: float
    tokens_per_step: int
    contexts: tuple[int, ...]
    lr: float
    samples: int
    threads: int
    device: str
    compile: bool


def parse_options() -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    parser.add_argument("--overwrite", action="store_true", help="empty a non-empty --output first")
    parser.add_argument("--size", choices=SIZES, default="8M", help="parameters")
    parser.add_argument("--english", type=Path, help="an English text to mix in (may be .xz)")
    parser.add_argument("--english-share", type=float, default=0.12, help="its share of the tokens")
    parser.add_argument("--seconds", type=float, default=290.0, help="training time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--megabytes", type=float, default=250.0, help="source text, 10^6 bytes")
    parser.add_argument("--tokens-per-step", type=int, default=131_072)
    parser.add_argument("--contexts", default="1024,4096,8192,16384", help="tokens, growing")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--samples", type=int, default=60, help="needle questions a length")
    parser.add_argument("--threads", type=int, default=4, help="threads that compose batches")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    values = vars(parser.parse_args())
    values["contexts"] = tuple(int(part) for part in values["contexts"].split(","))
    options = Options(**values)
    if options.output.exists() and any(options.output.iterdir()):
        if not options.overwrite:
            parser.error(f"--output: {options.output} is not empty; add --overwrite to replace it")
        shutil.rmtree(options.output)
    options.output.mkdir(parents=True, exist_ok=True)
    return options


def weighted_loss(
    states: Tensor, head: Tensor, targets: Tensor, kinds: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss to minimise, and ``[4]`` sums: source loss and tokens, answer loss and tokens.

    Args:
        states: hidden states ``[tokens, hidden]``; head: output matrix ``[vocabulary, hidden]``.
        targets, kinds: next token and what it belongs to, both ``[tokens]``.
        weights: loss weight of every kind, ``[4]``.
    """
    losses = F.cross_entropy(F.linear(states, head).float(), targets, reduction="none")
    weight = weights[kinds]
    parts = []
    for kind in (SOURCE, ANSWER):
        chosen = (kinds == kind).float()
        parts += [(losses.detach() * chosen).sum(), chosen.sum()]
    return (losses * weight).sum() / weight.sum(), torch.stack(parts)


def stage_context(progress: float, contexts: tuple[int, ...]) -> int:
    """The context in tokens at ``progress`` (0 to 1) of the training time."""
    even = (1 / len(contexts),) * len(contexts)
    shares = STAGE_SHARES if len(contexts) == len(STAGE_SHARES) else even
    for context, share in zip(contexts, shares, strict=True):
        progress -= share
        if progress < 0:
            return context
    return contexts[-1]


def prefetch(
    composer: Composer, options: Options, progress: Callable[[], float]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Endless ``(context, ids, kinds)`` on the CPU, composed ahead by threads, pinned for a GPU."""
    pin = options.device.startswith("cuda")

    def compose(step: int, context: int) -> tuple[int, Tensor, Tensor]:
        sequences = max(1, options.tokens_per_step // context)
        batch: Batch = composer.batch(step, sequences, context)
        ids, kinds = torch.from_numpy(batch.ids), torch.from_numpy(batch.kinds)
        return (context, ids.pin_memory(), kinds.pin_memory()) if pin else (context, ids, kinds)

    with ThreadPoolExecutor(options.threads) as pool:
        queue: deque[Future] = deque()
        step = 0
        while True:
            while len(queue) < PREFETCH:
                queue.append(
                    pool.submit(compose, step, stage_context(progress(), options.contexts))
                )
                step += 1
            yield queue.popleft().result()


def train(
    model: LlamaForCausalLM, composer: Composer, options: Options, log: Callable[[str], None]
) -> tuple[int, int]:
    """Train for ``options.seconds``; returns steps and tokens."""
    optimiser = MuonAdamW(model)
    loss_function = weighted_loss
    if options.compile:
        # Layer by layer: the layers share one compilation for each context length.
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        loss_function = torch.compile(weighted_loss, dynamic=False)
    weights = torch.tensor(LOSS_WEIGHTS, device=options.device)
    sums = torch.zeros(4, device=options.device)
    start = last = time.perf_counter()
    step = tokens = tokens_before = 0

    def progress() -> float:
        return (time.perf_counter() - start) / options.seconds

    log("step seconds tokens context lr lm_loss answer_loss tokens_per_s")
    for context, ids, kinds in prefetch(composer, options, progress):
        done = progress()
        if done >= 1:
            break
        lr = options.lr * min(done / WARM_UP, (1 - done) / (1 - WARM_UP))
        ids = ids.to(options.device, non_blocking=True).long()
        kinds = kinds.to(options.device, non_blocking=True).long()
        states = hidden_states(model, ids[:, :-1])
        loss, parts = loss_function(
            states.flatten(0, 1),
            model.lm_head.weight,
            ids[:, 1:].flatten(),
            kinds[:, 1:].flatten(),
            weights,
        )
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step(lr)
        sums += parts
        step, tokens = step + 1, tokens + targets_in(ids)
        if step % LOG_EVERY == 0:
            source, n_source, answer, n_answer = sums.tolist()
            sums.zero_()
            now = time.perf_counter()
            log(
                f"{step} {now - start:.1f} {tokens} {context} {lr:.2e} "
                f"{source / max(1, n_source):.4f} {answer / max(1, n_answer):.4f} "
                f"{(tokens - tokens_before) / (now - last):,.0f}"
            )
            last, tokens_before = now, tokens
    log(f"trained {step:,} steps, {tokens:,} tokens, {time.perf_counter() - start:.1f} s")
    return step, tokens


def targets_in(ids: Tensor) -> int:
    """Tokens predicted in a batch of ids ``[sequences, context + 1]``."""
    return ids.shape[0] * (ids.shape[1] - 1)


def evaluate(options: Options, log: Callable[[str], None]) -> dict[str, object]:
    """Load the saved model as a user would and measure it on held-out text."""
    tokenizer = AutoTokenizer.from_pretrained(options.output)
    model = AutoModelForCausalLM.from_pretrained(options.output, dtype=torch.bfloat16)
    model.to(options.device).eval()
    haystack = held_out_haystack(tokenizer, options.seed)
    accuracy: dict[str, float] = {}
    for context in options.contexts[-3:]:
        samples = needle_samples(
            haystack,
            tokenizer,
            context=context,
            samples=options.samples,
            distractors=DISTRACTORS,
            seed=options.seed + context,
        )
        accuracy[str(context)] = needle_accuracy(model, samples)
        log(f"needle, {context:,} tokens: {accuracy[str(context)]:.1%} of {options.samples} exact")
    window = min(LOSS_CONTEXT, options.contexts[-1])
    loss = language_model_loss(model, haystack, window, LOSS_WINDOWS, options.seed)
    log(f"held-out loss, {LOSS_WINDOWS} windows of {window:,} tokens: {loss:.4f} nats a token")
    return {
        "needle_exact_match": accuracy,
        "needle_samples_per_context": options.samples,
        "needle_distractors": DISTRACTORS,
        "held_out_text": f"standard library of Python {platform.python_version()}, without tests",
        "held_out_loss_nats_per_token": loss,
        "held_out_loss_window_tokens": window,
    }


def device_name(device: str) -> str:
    """What people call the device."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()


def main() -> None:
    """Collect, train, save, evaluate."""
    options = parse_options()
    start = time.perf_counter()
    torch.manual_seed(options.seed)
    with (options.output / "training_log.txt").open("w", buffering=1) as file:

        def log(line: str) -> None:
            print(line, flush=True)
            file.write(line + "\n")

        texts = collect_sources(options.megabytes, options.seed)
        log(f"sources: {len(texts):,} files, {sum(map(len, texts)) / 1e6:.1f} M characters")
        english = read_english(options.english) if options.english else []
        tokenizer = train_tokenizer([*english, *texts], VOCABULARY, options.seed)
        corpus = encode_texts(tokenizer, texts)
        if english:
            prose = encode_texts(tokenizer, english)
            log(f"english: {len(prose):,} tokens, repeated to {options.english_share:.0%} of all")
            corpus = repeat_to_share(corpus, prose, options.english_share)
        log(f"corpus: {len(corpus):,} tokens, ready after {time.perf_counter() - start:.1f} s")
        composer = Composer(corpus, line_break_tokens(tokenizer), tokenizer, seed=options.seed)
        size = SIZES[options.size]
        model = build_model(size, tokenizer, options.contexts[-1], options.device)
        log(f"model: {model.num_parameters():,} parameters")
        steps, tokens = train(model, composer, options, log)
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(options.output, max_shard_size=SHARD)
        tokenizer.save_pretrained(options.output)
        record = {
            **evaluate(options, log),
            "training_seconds": options.seconds,
            "training_steps": steps,
            "training_tokens": tokens,
            "corpus_tokens": len(corpus),
            "seed": options.seed,
            "device": device_name(options.device),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        (options.output / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n")
        log(f"all done after {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
