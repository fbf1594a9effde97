"""The README's snippets run, and what it names is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_runs(snippet, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})
    if "generate" in snippet:
        assert "7316204" in capsys.readouterr().out.splitlines()[-1]


def test_there_are_snippets():
    assert len(SNIPPETS) >= 2


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_the_tree_names_what_is_there():
    tree = README.split("## The tree")[1].split("```")[1]
    for name in re.findall(r"(\w+\.py)", tree):
        assert list((ROOT / "src").rglob(name)), name
