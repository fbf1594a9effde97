"""Stock vLLM and TidalDecode in it, on one machine in one run, one engine after the other."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tidaldecode.bench.shapes import shape_config
from tidaldecode.bench.vllm_job import CONNECTOR, STOCK, TIDAL, Job, MixedLoad, Result, read_results
from tidaldecode.errors import TidalError
from tidaldecode.integrations.vllm.support import check_version
from tidaldecode.record import package_version

METHODS = (STOCK, TIDAL)
BACKENDS = {STOCK: "FLASH_ATTN", TIDAL: "CUSTOM"}
"""What vLLM calls them."""
_SLACK = 64
_POLL_SECONDS = 0.2
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the steps are driven, and timed, by the client
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def require_vllm() -> str:
    """The version of vLLM. Errors: `TidalError` where there is none, or an unsupported one."""
    version = package_version("vllm")
    if importlib.util.find_spec("vllm") is None or version is None:
        raise TidalError(
            "vllm: expected it to be installed, found none; pip install 'tidaldecode[vllm]'"
        )
    check_version(version)
    return version


def require_device(device: str) -> None:
    """See that there is a GPU; ``"cpu"`` leaves it to a vLLM that was built for CPUs.

    Errors: `TidalError`.
    """
    import torch

    if device not in ("auto", "cuda", "cpu"):
        raise TidalError(f"device: expected auto, cuda or cpu, got {device!r}")
    if device != "cpu" and not torch.cuda.is_available():
        raise TidalError(
            "device: expected an NVIDIA GPU, found none; --device cpu for a vLLM built for CPUs"
        )


def write_model(shape: str, folder: Path) -> Path:
    """A model directory of this shape without weights and tokenizer. Errors: `TidalError`."""
    config = shape_config(shape)
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    config.save_pretrained(folder)
    return folder


def make_jobs(
    model: Path,
    options: dict[str, Any],
    *,
    sizes: Sequence[tuple[int, int]],
    steps: int,
    mixed: MixedLoad | None,
    computed: bool,
    dtype: str,
    eager: bool,
    gpu_memory: float,
    max_model_len: int | None,
    chunk: int,
    seed: int = 0,
) -> dict[str, Job]:
    """The same work for every method; ``options`` are TidalDecode's in vLLM.

    Errors: `TidalError` for a ``max_model_len`` that the contexts do not fit into.
    """
    longest = max([context for context, _ in sizes], default=0)
    if mixed is not None:
        longest = max(longest, mixed.context, mixed.prompt_tokens + mixed.new_tokens)
    warmup = 5
    room = longest + 2 * (warmup + steps) + _SLACK
    if mixed is not None:
        room = max(room, mixed.context + 8192)
    if max_model_len is not None and max_model_len < room:
        raise TidalError(
            f"max-model-len: expected at least {room:,} for contexts up to {longest:,} tokens and "
            f"{steps} timed steps, got {max_model_len:,}"
        )
    rows = [batch for _, batch in sizes]
    if mixed is not None:
        rows.append(mixed.rows + mixed.prompts)
    engine: dict[str, Any] = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": dtype,
        "enforce_eager": eager,
        "max_model_len": max_model_len or room,
        "max_num_seqs": max(rows),
        "max_num_batched_tokens": chunk,
        "gpu_memory_utilization": gpu_memory,
        "enable_prefix_caching": False,
        "generation_config": "vllm",
        "seed": seed,
    }
    if not computed:
        engine["kv_transfer_config"] = CONNECTOR
    own = {STOCK: {}, TIDAL: {"additional_config": {"tidaldecode": options}}}
    return {
        method: Job(
            method,
            {**engine, "attention_backend": BACKENDS[method], **own[method]},
            list(sizes),
            steps,
            warmup,
            seed,
            computed,
            mixed,
        )
        for method in METHODS
    }


def run_job(job: Job, log: Path, on_result: Callable[[], None]) -> list[Result]:
    """Do a job in a process of its own; what it prints goes to ``log``, its results beside it.

    Errors: `TidalError` with the last line of the log, when the engine stops before its end.
    """
    job_file, answers = log.with_suffix(".job"), log.with_suffix(".jsonl")
    answers.unlink(missing_ok=True)
    job.save(job_file)
    command = [sys.executable, "-m", "tidaldecode.bench.vllm_engine", str(job_file), str(answers)]
    seen = 0
    with _process(command, log) as process:
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            found = len(list(read_results(answers)))
            for _ in range(found - seen):
                on_result()
            seen = found
    results = list(read_results(answers))
    for _ in range(len(results) - seen):
        on_result()
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise TidalError(
            f"{job.method}: expected the engine to do its work, it stopped with exit code "
            f"{process.returncode} after {len(results)} results: {lines[-1] if lines else 'silent'}; "
            f"its log: {log} (--log-dir keeps it)"
        )
    return results


@contextmanager
def _process(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block at the latest."""
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env={**os.environ, **_ENVIRONMENT}
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
            process.wait()
