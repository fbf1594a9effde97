"""`vllm serve` end to end: a streaming client of its OpenAI-compatible API, over loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("vllm.config", reason="make test-vllm installs vLLM")

from engines import BLOCK, MODEL, host_tokens, prompt

PATIENCE = 240
OPTIONS = {"budget": 32}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server that speaks the embedded model."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = f"{sys.executable} -m vllm.entrypoints.cli.main serve {MODEL} --host 127.0.0.1"
    arguments = {
        "port": port,
        "attention-backend": "CUSTOM",
        "additional-config": json.dumps({"tidaldecode": OPTIONS}),
        "dtype": "float32",
        "block-size": BLOCK,
        "max-model-len": 512,
        "max-num-seqs": 3,
        "kv-cache-memory-bytes": 64 << 20,
    }
    words = [*command.split(), "--enforce-eager"]
    for name, value in arguments.items():
        words += [f"--{name}", str(value)]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("w") as sink:
        process = subprocess.Popen(
            words, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ}
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(address, process, log)
        yield address
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server answers; its log, if it does not."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
            return
        except OSError:
            time.sleep(1)
    pytest.fail(f"the server did not come up:\n{log.read_text()[-4000:]}")


def stream(address: str, tokens: list[int], new_tokens: int) -> tuple[list[int], int]:
    """Greedy tokens of a streamed completion, and in how many events they came."""
    body = {
        "model": MODEL,
        "prompt": tokens,
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    found, events = [], 0
    with urllib.request.urlopen(request, timeout=60) as answer:
        for line in answer:
            data = line.decode().removeprefix("data: ").strip()
            if not data or data == "[DONE]":
                continue
            events += 1
            found += json.loads(data)["choices"][0]["token_ids"] or []
    return found, events


def test_a_stream_brings_the_tokens_of_the_transformers_integration(server):
    tokens = prompt(100)
    found, events = stream(server, tokens, 24)
    assert [found] == host_tokens([tokens], 24, **OPTIONS)
    assert [found] != host_tokens([tokens], 24)
    assert events >= 12
