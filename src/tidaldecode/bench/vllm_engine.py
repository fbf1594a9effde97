"""One vLLM engine in a process of its own: does a `Job`, writes each result as soon as it has it.

    python -m tidaldecode.bench.vllm_engine JOB RESULTS

The engine's loop runs here, so what is timed are whole steps: scheduling, the model, sampling, and the
tokens' way back to the client.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from tidaldecode.bench.timing import summarise
from tidaldecode.bench.vllm_job import (
    RANDOM_CONTEXT,
    Job,
    MixedLoad,
    MixedTime,
    Started,
    StepTime,
    append_result,
)

_WEIGHT_SPREAD = 0.02
"""Standard deviation of random weights: what transformers begins the training of these models with."""


class Engine:
    """A vLLM engine with random weights, and requests by number."""

    def __init__(self, job: Job) -> None:
        from vllm import LLM

        self.job = job
        self.llm = LLM(**job.engine)
        self.llm.apply_model(_randomise)
        self.engine = self.llm.llm_engine
        settings = self.engine.vllm_config
        self.cache_tokens: int = (
            settings.cache_config.num_gpu_blocks * settings.cache_config.block_size
        )
        self.vocabulary: int = settings.model_config.get_vocab_size()
        self._random = random.Random(job.seed)
        self._number = 0

    def add(self, tokens: int, new_tokens: int, *, computed: bool) -> str:
        """Ask for ``new_tokens`` after a random prompt of ``tokens``; the request's name."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        extra = None if computed else {"kv_transfer_params": RANDOM_CONTEXT}
        params = SamplingParams(
            max_tokens=new_tokens,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=extra,
        )
        prompt = self._random.choices(range(1, self.vocabulary), k=tokens)
        self._number += 1
        name = str(self._number)
        self.engine.add_request(name, tokens_input(prompt), params)
        return name

    def step(self) -> dict[str, int]:
        """One step of the engine: how many tokens each request got."""
        return {
            output.request_id: len(output.outputs[0].token_ids)
            for output in self.engine.step()
            if output.outputs[0].token_ids
        }

    def stop(self, names: list[str]) -> None:
        """Abort these requests and run until nothing is left."""
        self.engine.abort_request(names)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        for _ in range(3):  # batches that were under way
            self.engine.step()


def _randomise(model: torch.nn.Module) -> None:
    """Weights of a model at the beginning of its training: vLLM's own dummies leave no signal."""
    generator: torch.Generator | None = None
    with torch.inference_mode():
        for name, weight in model.named_parameters():
            if generator is None:
                generator = torch.Generator(weight.device).manual_seed(0)
            if weight.dim() > 1:
                weight.normal_(0, _WEIGHT_SPREAD, generator=generator)
            else:
                weight.fill_(0 if name.endswith("bias") else 1)


def time_steps(engine: Engine, context: int, batch: int) -> StepTime:
    """Decode steps of ``batch`` rows of about ``context`` tokens, all rows in every step."""
    job = engine.job
    new_tokens = 2 * (job.warmup + job.steps) + 8
    if batch * (context + new_tokens) > engine.cache_tokens:
        return StepTime(context, batch, None)
    names = [engine.add(context, new_tokens, computed=job.computed) for _ in range(batch)]
    samples: list[float] = []
    full_steps, last = 0, time.perf_counter()
    while len(samples) < job.steps:
        tokens = engine.step()
        now = time.perf_counter()
        if not tokens:
            continue
        full_steps = full_steps + 1 if len(tokens) == batch else 0
        if full_steps > job.warmup:
            samples.append(1e3 * (now - last))
        last = now
    engine.stop(names)
    timing = summarise(samples)
    return StepTime(context, batch, timing.median_ms, timing.low_ms, timing.high_ms)


def time_mixed(engine: Engine, load: MixedLoad) -> MixedTime:
    """Time per output token while prompts arrive; from the first arrival to the last prompt's end."""
    job = engine.job
    most = min(8192, job.engine["max_model_len"] - load.context)
    rows = [engine.add(load.context, most, computed=job.computed) for _ in range(load.rows)]
    full_steps = 0
    while full_steps <= job.warmup:
        full_steps += len(engine.step()) == load.rows
    begin = time.perf_counter()
    arrivals = [begin + index * load.interval for index in range(load.prompts)]
    arrived: dict[str, float] = {}
    got: dict[str, int] = {}
    last: dict[str, float] = {}
    between, first = [], []
    total = 0
    while len(arrived) < load.prompts or any(got.get(n, 0) < load.new_tokens for n in arrived):
        while len(arrived) < load.prompts and time.perf_counter() >= arrivals[len(arrived)]:
            due = arrivals[len(arrived)]
            arrived[engine.add(load.prompt_tokens, load.new_tokens, computed=True)] = due
        tokens = engine.step()
        now = time.perf_counter()
        for name, count in tokens.items():
            total += count
            got[name] = got.get(name, 0) + count
            if name in last:
                between += [1e3 * (now - last[name]) / count] * count
            elif name in arrived:
                first.append(1e3 * (now - arrived[name]))
            last[name] = now
    seconds = time.perf_counter() - begin
    engine.stop(rows)
    between.sort()
    return MixedTime(
        p50_ms=between[len(between) // 2],
        p99_ms=between[min(len(between) - 1, int(0.99 * len(between)))],
        first_token_ms=summarise(first).median_ms,
        tokens_per_second=total / seconds,
        seconds=seconds,
    )


def results(job: Job) -> Iterator[Started | StepTime | MixedTime]:
    """Everything that the job asks for."""
    begin = time.perf_counter()
    engine = Engine(job)
    yield Started(time.perf_counter() - begin, engine.cache_tokens)
    for context, batch in job.sizes:
        yield time_steps(engine, context, batch)
    if job.mixed is not None:
        yield time_mixed(engine, job.mixed)


def main(job: Path, answers: Path) -> None:
    """Do the job in one file, write results to the other."""
    for result in results(Job.load(job)):
        append_result(answers, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
