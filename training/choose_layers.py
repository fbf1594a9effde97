"""Choose the selection layers of a trained model by the KL divergence of its logits.

    python training/choose_layers.py --model DIR --output DIR/tidal_config.json

Every question is prefilled once; question and right answer are then fed token by token, with full
attention and with every candidate. What counts is KL(full || candidate) in nats, averaged over the
answer's tokens: what the model says, not which tokens it read. The first selection layer is the one
after the dense layers. The best second layer is searched first, then the best third beside it.
"""

from __future__ import annotations

import argparse
import random
import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tidaldecode.config import TidalConfig
from tidaldecode.eval.haystack import standard_library_text
from tidaldecode.eval.needle import ANSWER_DIGITS, Haystack, NeedleSample, make_sample
from tidaldecode.integrations.transformers.engine import TransformersEngine
from tidaldecode.integrations.transformers.loading import load_model
from tidaldecode.record import run_record, write_json

Layers = tuple[int, ...]


def answer_logits(
    engine: TransformersEngine, sample: NeedleSample, config: TidalConfig | None
) -> torch.Tensor:
    """Log-probabilities ``[answer tokens, vocabulary]`` given the right tokens before each."""
    forced = sample.question_ids + sample.answer_ids
    logits = [step.log_softmax(-1) for step, _ in engine.steps(forced, 0, config)]
    return torch.stack(logits[-ANSWER_DIGITS:])


def mean_kl(
    engine: TransformersEngine,
    samples: list[NeedleSample],
    base: TidalConfig,
    candidates: list[Layers],
) -> dict[Layers, float]:
    """KL to full attention in nats per answer token, for every candidate."""
    found: dict[Layers, list[float]] = {layers: [] for layers in candidates}
    for sample in track(samples, description=f"{len(candidates)} candidates"):
        engine.prefill(sample.context_ids)
        full = answer_logits(engine, sample, None)
        for layers in candidates:
            sparse = answer_logits(engine, sample, base.replace(select_layers=layers))
            found[layers].append(float((full.exp() * (full - sparse)).sum(-1).mean()))
    return {layers: statistics.mean(values) for layers, values in found.items()}


def main() -> None:
    """Search, print the table, write the configuration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="a tidal_config.json to write")
    parser.add_argument("--contexts", default="8192,16384", help="tokens")
    parser.add_argument("--samples", type=int, default=6, help="questions per context")
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--count", type=int, default=3, help="selection layers at most")
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--report", type=Path, help="a JSON file for all figures")
    options = parser.parse_args()

    model, tokenizer = load_model(options.model)
    engine = TransformersEngine(model)
    haystack = Haystack.from_text(
        standard_library_text(1_000_000, options.seed), tokenizer.encode, tokenizer.decode
    )
    samples = [
        make_sample(
            haystack,
            tokenizer.encode,
            context_tokens=int(context),
            depth=(index + 0.5) / options.samples,
            distractors=8,
            rng=random.Random(f"{options.seed}/{context}/{index}"),
        )
        for context in options.contexts.split(",")
        for index in range(options.samples)
    ]
    base = TidalConfig(budget=options.budget, select_layers=(2,))
    depth = model.config.num_hidden_layers
    best: Layers = (base.dense_layers,)
    figures: dict[Layers, float] = {}
    while len(best) < options.count:
        candidates = [
            tuple(sorted({*best, layer}))
            for layer in range(base.dense_layers + 1, depth - 1)
            if layer not in best
        ]
        found = mean_kl(engine, samples, base, candidates)
        figures |= found
        winner = min(found, key=found.__getitem__)
        if best in figures and figures[winner] >= figures[best]:
            break
        best = winner

    table = Table("selection layers", "KL to full attention (nats/token)")
    for layers in sorted(figures, key=figures.__getitem__):
        table.add_row(", ".join(map(str, layers)), f"{figures[layers]:.4f}")
    Console().print(table)
    write_json(options.output, base.replace(select_layers=best).to_dict())
    if options.report:
        record = run_record(seed=options.seed, samples=len(samples), contexts=options.contexts)
        named = {",".join(map(str, layers)): value for layers, value in figures.items()}
        write_json(options.report, {"record": record, "kl_nats": named, "chosen": list(best)})


if __name__ == "__main__":
    main()
