"""Result files are written whole or not at all, and say where they come from."""

import json
import os
import stat
from datetime import datetime, timedelta, timezone

import pytest
import torch

import tidaldecode
from tidaldecode.errors import TidalError
from tidaldecode.record import package_version, run_record, write_file, write_json


def files_below(directory) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_json_is_written_and_read_back(tmp_path):
    value = {"a": [1, 2.5, None, "ä"], "b": {"c": True}}
    path = write_json(tmp_path / "result.json", value)
    assert path == tmp_path / "result.json"
    assert json.loads(path.read_text(encoding="utf-8")) == value
    assert path.read_text(encoding="utf-8").endswith("}\n")
    assert files_below(tmp_path) == ["result.json"]


def test_folders_are_made_on_the_way(tmp_path):
    write_json(tmp_path / "a" / "b" / "result.json", 1)
    assert files_below(tmp_path) == ["a", "a/b", "a/b/result.json"]


def test_an_old_file_is_replaced(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old, and longer than the new one")
    write_json(path, 1)
    assert path.read_text() == "1\n"
    assert files_below(tmp_path) == ["result.json"]


def test_others_may_read_a_result(tmp_path):
    path = write_json(tmp_path / "result.json", 1)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o644


def test_the_writer_gets_a_file_beside_the_target_with_its_suffix(tmp_path):
    seen = []
    write_file(tmp_path / "plot.png", lambda path: seen.append(path) or path.write_bytes(b"x"))
    assert seen[0].parent == tmp_path and seen[0].suffix == ".png"
    assert seen[0].name != "plot.png" and files_below(tmp_path) == ["plot.png"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, ValueError])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "result.json"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half of the n")
        assert path.read_text() == "old", "the target changes before the writer is done"
        raise error

    with pytest.raises(error):
        write_file(path, write)
    assert path.read_text() == "old" and files_below(tmp_path) == ["result.json"]


def test_a_writer_that_runs_out_of_space_is_a_clear_error(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")

    def write(_):
        raise OSError(28, "No space left on device")

    with pytest.raises(TidalError, match=r"result\.json: expected a place .*: No space left"):
        write_file(path, write)
    assert path.read_text() == "old" and files_below(tmp_path) == ["result.json"]


def test_a_value_that_is_not_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_json(path, {"tensor": torch.zeros(1)})
    assert path.read_text() == "old" and files_below(tmp_path) == ["result.json"]


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TidalError, match=r"expected a place to write results to, got: "):
        write_json(tmp_path / "file" / "result.json", 1)
    assert files_below(tmp_path) == ["file"]


def test_a_target_that_is_a_folder_is_refused_and_nothing_is_left(tmp_path):
    (tmp_path / "result.json").mkdir()
    with pytest.raises(TidalError, match=r"result\.json: expected a place to write results to"):
        write_json(tmp_path / "result.json", 1)
    assert files_below(tmp_path) == ["result.json"]


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(TidalError, match=r"Permission denied"):
        write_json(tmp_path / "result.json", 1)


def test_a_record_says_when_where_and_with_what_it_was_made():
    record = run_record(config={"budget": 64}, seed=3, n=10)
    assert list(record) == [
        *("time", "command", "commit", "python", "versions", "device"),
        *("config", "seed", "n"),
    ]
    made = datetime.fromisoformat(record["time"])
    assert timedelta(0) <= datetime.now(timezone.utc) - made < timedelta(minutes=5)
    assert record["command"] and "/" not in record["command"][0]
    assert record["commit"] is None or record["commit"]
    assert record["versions"]["torch"] == package_version("torch") is not None
    assert record["versions"]["tidaldecode"] == tidaldecode.__version__
    assert {"transformers", "safetensors"} <= set(record["versions"])
    assert (record["config"], record["seed"], record["n"]) == ({"budget": 64}, 3, 10)
    assert json.loads(json.dumps(record)) == record


@pytest.mark.skipif(torch.cuda.is_available(), reason="names the GPU there")
def test_a_record_made_on_a_processor_names_it_and_its_threads():
    assert run_record()["device"].startswith("CPU ")
    assert run_record()["device"].endswith(f"{torch.get_num_threads()} threads")


def test_a_package_that_is_not_installed_has_no_version():
    assert package_version("no-such-package-anywhere") is None
