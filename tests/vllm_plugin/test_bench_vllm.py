"""`tidaldecode bench vllm` with real engines on a CPU, and its refusals."""

import json

import pytest

pytest.importorskip("vllm.config", reason="make test-vllm installs vLLM")

from tidaldecode.bench.vllm import make_jobs, require_vllm, run_job, write_model
from tidaldecode.bench.vllm_job import STOCK, TIDAL, MixedLoad, MixedTime, Started, StepTime
from tidaldecode.cli import run
from tidaldecode.errors import TidalError

TINY = "bench vllm --shape tiny --dtype float32 --device cpu --eager --steps 3 --chunk 64".split()
SIZES = "--context 96 --context 40 --batch 1 --batch 2 --budget 32 --select-layers 2".split()
MIXED = (
    "--mixed --mixed-rows 2 --mixed-context 64 --prompts 2 --prompt-tokens 80 --new-tokens 3 "
    "--interval 0.01"
).split()


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")


def test_both_engines_are_timed_with_random_contexts_and_under_a_mixed_load(tmp_path, capsys):
    files = ["--json", str(tmp_path / "v.json"), "--log-dir", str(tmp_path)]
    assert run([*TINY, *SIZES, *MIXED, *files]) == 0, (tmp_path / f"{STOCK}.log").read_text()[
        -3000:
    ]
    shown = capsys.readouterr().out
    assert "speed-up" in shown and "time per output token" in shown
    found = json.loads((tmp_path / "v.json").read_text())
    assert found["record"]["vllm"] == require_vllm()
    assert list(found["results"]) == [STOCK, TIDAL]
    for results in found["results"].values():
        kinds = [result["kind"] for result in results]
        assert kinds == ["started", "step", "step", "step", "step", "mixed"]
        steps = [(r["context"], r["batch"]) for r in results if r["kind"] == "step"]
        assert steps == [(40, 1), (40, 2), (96, 1), (96, 2)]
        for result in results[1:5]:
            assert 0 < result["low_ms"] <= result["milliseconds"] <= result["high_ms"]
        assert 0 < results[5]["p50_ms"] <= results[5]["p99_ms"]
    assert "TidalDecode: DDS..." in (tmp_path / f"{TIDAL}.log").read_text()


def jobs(tmp_path, **changes):
    settings = {
        "sizes": [(40, 1)],
        "steps": 3,
        "mixed": None,
        "computed": True,
        "dtype": "float32",
        "eager": True,
        "gpu_memory": 0.5,
        "max_model_len": None,
        "chunk": 64,
    }
    model = write_model("tiny", tmp_path / "model")
    return make_jobs(model, {"budget": 32}, **{**settings, **changes})


def test_computed_contexts_and_a_batch_that_does_not_fit(tmp_path):
    job = jobs(tmp_path, sizes=[(40, 1), (60, 3)])[TIDAL]
    job.engine.update(block_size=16, num_gpu_blocks_override=1 + 160 // 16)
    done = []
    found = run_job(job, tmp_path / "log", lambda: done.append(1))
    assert [type(result) for result in found] == [Started, StepTime, StepTime]
    assert found[1].milliseconds > 0 and found[2].milliseconds is None
    assert len(done) == 3


def test_an_engine_that_stops_is_an_error_with_its_last_word(tmp_path):
    job = jobs(tmp_path)[TIDAL]
    job.engine["additional_config"]["tidaldecode"]["select_layers"] = [77]
    with pytest.raises(TidalError, match="TidalDecode: expected the engine to do its work"):
        run_job(job, tmp_path / "log", lambda: None)
    assert "select_layers: expected layer numbers from 0 to 5" in (tmp_path / "log").read_text()


def test_a_length_that_the_contexts_do_not_fit_into_is_refused(tmp_path):
    with pytest.raises(TidalError, match="max-model-len: expected at least"):
        jobs(tmp_path, max_model_len=48)


def test_a_job_comes_back_from_its_file(tmp_path):
    load = MixedLoad(1, 2, 3, 4, 5, 0.5)
    job = jobs(tmp_path, mixed=load)[STOCK]
    job.save(tmp_path / "job")
    assert type(job).load(tmp_path / "job") == job
    assert MixedTime(1, 2, 3, 4, 5).kind == "mixed"
