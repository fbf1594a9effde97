"""``tidaldecode calibrate`` finds a plan, writes it, and refuses to overwrite or to misuse it."""

import json
import shutil
import warnings

import pytest

from tidaldecode import TidalConfig, TidalError, enable
from tidaldecode.cli import run
from tidaldecode.demo import MODEL_DIRECTORY
from tidaldecode.errors import UncalibratedWarning
from tidaldecode.integrations.transformers.loading import load_model, load_skeleton

QUICK = ["--context", "1024", "--budget", "32", "--needles", "2", "--passages", "1"]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated")
    assert run(["calibrate", "--output", str(folder), "--count", "2", *QUICK]) == 0
    return folder


@pytest.fixture
def copy(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODEL_DIRECTORY, folder)
    return folder


def test_the_best_pair_is_chosen_and_the_default_is_priced(calibrated):
    figures = json.loads((calibrated / "calibration.json").read_text())
    losses = figures["kl_nats"]
    pairs = {name: loss for name, loss in losses.items() if name.count(",") == 1}
    best = min(pairs, key=pairs.get)
    assert len(pairs) == 8
    assert figures["chosen"] == [int(layer) for layer in best.split(",")]
    assert pairs[best] < 0.2 * losses["2"]
    assert figures["chosen"][1] in (5, 6, 7)
    assert figures["default"]["layers"] == [2, 5]
    assert sum(figures["decode_passes"].values()) == len(losses)


def test_the_file_serves_the_model_it_was_made_for(calibrated, copy):
    shutil.copy(calibrated / "tidal_config.json", copy)
    with enable(load_skeleton(copy)) as handle:
        assert handle.config.select_layers == TidalConfig.load(calibrated).select_layers
        assert handle.config.budget == 32
        assert "calibrated" in handle.reason


def test_the_shared_mass_is_one_on_the_diagonal_and_a_share_elsewhere(calibrated):
    mass = json.loads((calibrated / "calibration.json").read_text())["shared_mass"]
    for layer in range(2, 11):
        assert mass[layer][layer] == pytest.approx(1, abs=1e-4)
    assert all(0 <= share <= 1.0001 for row in mass for share in row)
    assert mass[6][7] < 1


def test_all_figures_carry_the_record(calibrated):
    config = json.loads((calibrated / "tidal_config.json").read_text())
    assert config["model"] == {"model_type": "llama", "num_layers": 12}
    assert config["calibration"]["record"]["request"]["context"] == 1024
    assert (calibrated / "calibration.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "value"), [("num_layers", 32), ("model_type", "qwen3")])
def test_a_file_of_another_model_is_refused(copy, name, value):
    path = copy / "tidal_config.json"
    model = {"model_type": "llama", "num_layers": 12, name: value}
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": model}))
    with pytest.raises(TidalError, match=f"calibration of this model.*{name} {value!r}"):
        enable(load_skeleton(copy))


def test_without_a_file_auto_warns_and_names_fallback_and_command(copy):
    (copy / "tidal_config.json").unlink()
    with pytest.warns(UncalibratedWarning, match=r"\(2, 5\).*tidaldecode calibrate --model"):
        enable(load_skeleton(copy)).disable()


def test_given_layers_or_a_file_do_not_warn(copy):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enable(load_skeleton(copy)).disable()
        (copy / "tidal_config.json").unlink()
        enable(load_skeleton(copy), select_layers=(2, 6)).disable()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--output"),
        (["--output", "OUT", "--text", "SHORT"], "expected more than"),
        (["--output", "OUT", "--context", "99999"], "context: expected 64 to 16,384"),
        (["--output", "OUT", "--needles", "0", "--passages", "0"], "at least one prompt"),
        (["--output", "OUT", "--budget", "4096"], "budget: expected fewer tokens"),
        (["--output", "OUT", "--granularity", "head"], "granularity: expected"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, options, message):
    short = tmp_path / "short.txt"
    short.write_text("a line\n" * 20)
    places = {"OUT": str(tmp_path / "out"), "SHORT": str(short)}
    assert run(["calibrate", *QUICK, *(places.get(word, word) for word in options)]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.strip().splitlines()) == 1
    assert not list(tmp_path.glob("out/*"))


def test_an_earlier_calibration_is_not_overwritten(calibrated, capsys):
    before = (calibrated / "tidal_config.json").read_bytes()
    assert run(["calibrate", "--output", str(calibrated), *QUICK]) == 2
    assert "tidal_config.json" in capsys.readouterr().err
    assert (calibrated / "tidal_config.json").read_bytes() == before


def test_the_written_settings_load_as_a_configuration(calibrated):
    model, _ = load_model(MODEL_DIRECTORY)
    with enable(model, TidalConfig.load(calibrated)) as handle:
        assert handle.reason == "given"
