"""Imports go one way: errors, config, record -> kernels -> algorithm -> integrations -> cli."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "tidaldecode"

# Who may import whom, beside itself and the foundations below.
FOUNDATIONS = {"errors", "config", "record", "engine", "figure", "processor"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "record": set(),
    "config": set(),
    "engine": set(),
    "figure": set(),
    "processor": set(),
    "kernels": set(),
    "algorithm": {"kernels"},
    "integrations": {"algorithm", "kernels"},
    "eval": {"algorithm", "kernels"},
    "bench": {"algorithm", "integrations", "kernels"},
    "calibrate": {"algorithm", "eval", "integrations"},
    "demo": {"algorithm", "eval", "integrations"},
    "proof": {"algorithm", "eval", "integrations", "kernels"},
    "cli": {"algorithm", "bench", "calibrate", "demo", "eval", "integrations", "kernels", "proof"},
    "__init__": {"algorithm", "integrations"},
    "__main__": {"cli"},
}


def room(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "tidaldecode":
                names = [f"tidaldecode.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "tidaldecode" and len(parts) > 1:
                rooms.add(parts[1])
    return rooms & set(ALLOWED)


def test_no_import_goes_up() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        here = room(path)
        allowed = ALLOWED[here] | FOUNDATIONS | {here}
        wrong += [
            f"{path.relative_to(ROOT)} imports {there}" for there in imported_rooms(path) - allowed
        ]
    assert not wrong, wrong


def test_every_room_is_known() -> None:
    found = {room(path) for path in ROOT.rglob("*.py")}
    assert found <= set(ALLOWED)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("tidaldecode", ["torch", "triton", "transformers", "vllm", "matplotlib"]),
        ("tidaldecode.kernels", ["triton", "transformers", "vllm", "matplotlib"]),
        ("tidaldecode.algorithm", ["transformers", "vllm", "matplotlib"]),
    ],
)
def test_importing_stays_light(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([n for n in {absent!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
