"""The harness's own tasks, read from local files, on the embedded model."""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_EVALUATE_OFFLINE"] = "1"
pytest.importorskip("lm_eval")

import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from tidaldecode import cli
from tidaldecode.config import TidalConfig
from tidaldecode.demo import MODEL_DIRECTORY
from tidaldecode.errors import TidalError
from tidaldecode.eval.needle import question_text, statement_text
from tidaldecode.integrations.lm_eval import TidalLM

KEYS = ["amber falcon", "silver river", "quiet harbor"]
CODES = ["1234567", "7654321", "4082957"]
FILLER = "import os\nfor name in os.listdir('.'):\n    print(name, len(name))\n"
MULTIPLE_CHOICE = {
    "task": "tidal_choice",
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc"}],
}
GENERATE = {
    "task": "tidal_generate",
    "output_type": "generate_until",
    "generation_kwargs": {
        "until": ["\n"],
        "max_gen_toks": 12,
        "do_sample": False,
        "temperature": 1,  # LongBench's tasks say so; do_sample decides
    },
    "metric_list": [{"metric": "exact_match"}],
}


def document(index: int) -> dict[str, Any]:
    """A needle question; documents differ in length."""
    statements = "".join(map(statement_text, KEYS, CODES))
    text = FILLER * (2 + index) + statements + FILLER * 2 + question_text(KEYS[index])
    return {"prompt": text, "choices": CODES, "label": index, "code": CODES[index]}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the harness's report on the machine, which asks pip for a second."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    folder = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps(document(index)) for index in range(len(KEYS))]
    (folder / "needles.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for task, target in ((MULTIPLE_CHOICE, "label"), (GENERATE, "code")):
        source = {
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(folder / "needles.jsonl")},
                "cache_dir": str(folder / "cache"),
            },
            "test_split": "test",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": target if target == "label" else "{{code}}",
            "target_delimiter": "",
        }
        text = yaml.safe_dump({**source, **task})
        (folder / f"{task['task']}.yaml").write_text(text, encoding="utf-8")
    return TaskManager(include_path=str(folder), include_defaults=False)


def model(**options: Any) -> TidalLM:
    return TidalLM(**{"pretrained": str(MODEL_DIRECTORY), "device": "cpu", **options})


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def evaluate(lm: TidalLM, task: str, tasks: TaskManager) -> tuple[dict[str, Any], list[Any]]:
    """The task's metrics, and what the model answered to each document."""
    done = simple_evaluate(lm, tasks=[task], task_manager=tasks, bootstrap_iters=0)
    return done["results"][task], [sample["resps"] for sample in done["samples"][task]]


def scores(answers: list[Any]) -> torch.Tensor:
    return torch.tensor([[float(choice[0][0]) for choice in choices] for choices in answers])


def plain(lm: TidalLM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Score and greedy equality by one forward pass over everything."""
    with torch.inference_mode():
        logits = lm.engine.model(torch.tensor([context + continuation])).logits[0].float()
    logits = logits[len(context) - 1 : -1]
    wanted = torch.tensor(continuation)
    picked = logits.log_softmax(-1)[range(len(wanted)), wanted]
    return float(picked.sum()), bool((logits.argmax(-1) == wanted).all())


def test_choices_by_a_full_budget_equal_dense_and_by_a_small_one_do_not(tasks: TaskManager) -> None:
    dense, dense_answers = evaluate(model(method="dense", batch_size=2), "tidal_choice", tasks)
    full, full_answers = evaluate(model(budget=4096, batch_size=3), "tidal_choice", tasks)
    _, small_answers = evaluate(model(budget=20), "tidal_choice", tasks)
    assert dense["acc,none"] == full["acc,none"] == 1.0
    torch.testing.assert_close(scores(full_answers), scores(dense_answers), atol=1e-4, rtol=0)
    assert (scores(small_answers) - scores(dense_answers)).abs().max() > 0.01


def test_generated_codes_end_at_the_stop_string(tasks: TaskManager) -> None:
    options = {"batch_size": 2, "question_tokens": 16}
    dense, dense_answers = evaluate(model(method="dense", **options), "tidal_generate", tasks)
    full, full_answers = evaluate(model(budget=4096, **options), "tidal_generate", tasks)
    assert dense["exact_match,none"] == full["exact_match,none"] == 1.0
    assert dense_answers == full_answers == [[[code]] for code in CODES]


def test_generation_feeds_the_question_through_the_method() -> None:
    asked = request(document(1)["prompt"], {"until": ["\n"], "max_gen_toks": 7})
    lm = model(select_layers="none", dense_layers=0, budget=20)
    fed = []
    for lm.question_tokens in (1, 24):
        fed += lm.generate_until([asked])
    assert fed[0] != fed[1] != CODES[1]


def test_generation_ends_with_the_text_and_after_max_gen_toks() -> None:
    lm = model(method="dense", batch_size=2, question_tokens=8)
    settings = {"until": [], "max_gen_toks": 3}
    prompts = [request(document(index)["prompt"], settings) for index in range(2)]
    assert lm.generate_until(prompts) == [code[:3] for code in CODES[:2]]
    lm._ends = {lm.tok_encode("3")[0]}
    assert lm.generate_until(prompts) == ["12", "765"]


def test_dense_equals_one_plain_forward_pass() -> None:
    lm = model(method="dense", batch_size=4)
    texts = [("", "import os\n"), ("import os\nfor", " name in os.listdir():"), ("import", " os")]
    texts += [(document(0)["prompt"], code) for code in CODES]
    answers = lm.loglikelihood([request(*text) for text in texts])
    for (context, continuation), (score, greedy) in zip(texts, answers, strict=True):
        if context:
            wanted, greedy_wanted = plain(lm, *lm._encode_pair(context, continuation))
        else:
            prefix = [lm.prefix_token_id]
            wanted, greedy_wanted = plain(lm, prefix, lm.tok_encode(continuation))
        assert score == pytest.approx(wanted, abs=1e-4)
        assert greedy == greedy_wanted
    assert [greedy for _, greedy in answers[-3:]] == [True, False, False]


def test_rolling_windows_score_every_token_once() -> None:
    lm = model(method="dense", max_length=16, batch_size=2)
    texts = [FILLER, "import os\n"]
    totals = lm.loglikelihood_rolling([request(text) for text in texts])
    ids = lm.tok_encode(FILLER)
    assert 16 < len(ids) <= 32
    wanted = plain(lm, [lm.prefix_token_id], ids[:16])[0]
    rest = len(ids) - 16
    wanted += plain(lm, ids[-17:-rest], ids[-rest:])[0]
    assert totals[0] == pytest.approx(wanted, abs=1e-4)
    short = plain(lm, [lm.prefix_token_id], lm.tok_encode(texts[1]))[0]
    assert totals[1] == pytest.approx(short, abs=1e-4)


def test_what_does_not_fit_is_cut_on_the_left(caplog: pytest.LogCaptureFixture) -> None:
    lm = model(method="dense", max_length=24)
    context, continuation = lm._encode_pair(document(0)["prompt"], CODES[0])
    (score, _) = lm.loglikelihood([request(document(0)["prompt"], CODES[0])])[0]
    kept = context[-(25 - len(continuation)) :]
    assert score == pytest.approx(plain(lm, kept, continuation)[0], abs=1e-4)
    assert f"only the last {len(kept)} are used" in caplog.text
    lm.generate_until([request(document(0)["prompt"], {"max_gen_toks": 4})])
    assert "only the last 20 are used" in caplog.text
    with pytest.raises(TidalError, match="1 to max_length=24 tokens"):
        lm.loglikelihood([request("import", FILLER * 2)])
    with pytest.raises(TidalError, match="raise max_length or lower max_gen_toks"):
        lm.generate_until([request(FILLER, {"max_gen_toks": 24})])


def test_settings_come_from_the_args_and_the_file_beside_the_model() -> None:
    lm = model(budget=128, select_layers="2+6", sink_tokens=5, max_length="512")
    file = TidalConfig.load(MODEL_DIRECTORY)
    assert lm.config == file.replace(budget=128, select_layers=(2, 6), sink_tokens=5)
    assert lm.get_model_info()["tidal_config"]["select_layers"] == [2, 6]
    assert model().config == file
    given = {"pretrained": str(MODEL_DIRECTORY), "device": "cpu", "batch_size": "4"}
    merged = TidalLM.create_from_arg_obj(given, {"device": "cuda:0", "batch_size": 1})
    assert (merged.batch_size, merged.device) == (4, torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bugdet": 64}, "expected pretrained, method, .*budget.*got 'bugdet'"),
        ({"trust_remote_code": True}, "got 'trust_remote_code'"),
        ({"pretrained": None}, "pretrained: expected a model directory"),
        ({"pretrained": "no/such/folder"}, "found none at no/such/folder"),
        ({"method": "fast"}, "method: expected tidal or dense"),
        ({"batch_size": "auto"}, "batch_size: expected a whole number"),
        ({"question_tokens": 0}, "question_tokens: expected a whole number"),
        ({"budget": "many"}, "budget: expected a whole number"),
        ({"select_layers": "2,6"}, "select_layers: expected 'auto' or ascending"),
        ({"method": "dense", "budget": 3}, "budget: expected at least"),
    ],
)
def test_bad_model_args_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TidalError, match=message):
        model(**options)


@pytest.mark.parametrize(
    "settings", [{"do_sample": True}, {"temperature": 0.7}, {"num_beams": 4}, {"repetition": 1.2}]
)
def test_only_greedy_decoding_is_accepted(settings: dict[str, Any]) -> None:
    with pytest.raises(TidalError, match="expected greedy decoding"):
        model().generate_until([request("import os", settings)])


def test_the_command_knows_the_model(
    tasks: TaskManager, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real command, but for reading the harness's thousands of own tasks."""
    config = "lm_eval.config.evaluate_config.EvaluatorConfig.process_tasks"
    monkeypatch.setattr(config, lambda self, metadata=None: tasks)
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)
    base = f"pretrained={MODEL_DIRECTORY},device=cpu,question_tokens=16,select_layers=2+6+7"
    arguments = ["--model", "tidaldecode", "--tasks", "tidal_generate", "--limit", "1"]
    before = sys.argv
    assert cli.run(["lm-eval", *arguments, "--model_args", f"{base},budget=64"]) == 0
    assert "|exact_match|↑  |  1|" in capsys.readouterr().out
    assert cli.run(["lm-eval", *arguments, "--model_args", f"{base},bugdet=64"]) == 2
    assert "tidaldecode: error: model_args: expected" in capsys.readouterr().err
    assert sys.argv is before


def test_the_commands_help_and_faults_are_the_harnesss(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["lm-eval", "--help"]) == 0
    assert "usage: lm-eval" in capsys.readouterr().out
    assert cli.run(["lm-eval", "--limit", "many"]) == 2
    assert "--limit" in capsys.readouterr().err


def test_a_missing_harness_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.run(["lm-eval", "--tasks", "ruler"]) == 2
    assert "pip install 'tidaldecode[lm-eval]'" in capsys.readouterr().err
