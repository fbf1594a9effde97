"""Methods by name: what each name means, how options are written, and what is refused."""

import pytest

from tidaldecode import TidalConfig, TidalError
from tidaldecode.eval.methods import NAMES, Method, parse_methods

BASE = TidalConfig(budget=64, select_layers=(2, 6, 7), recent_tokens=11)


def parsed(*texts: str, budgets=()) -> list[Method]:
    return parse_methods(texts, BASE, budgets)


def only(text: str, **options) -> TidalConfig | None:
    [method] = parsed(text, **options)
    return method.config


def test_every_name_means_what_its_system_does():
    expected = {
        "dense": None,
        "tidal": BASE,
        "paper": TidalConfig.preset("paper", budget=64, select_layers=(2, 6, 7)),
        "lessismore": TidalConfig.preset("lessismore", budget=64, select_layers=(2, 6, 7)),
        "streaming": TidalConfig.preset("streaming", budget=64),
        "recent": TidalConfig.preset("streaming", budget=64, sink_tokens=0, recent_tokens=63),
        "quest": TidalConfig.preset("quest", budget=64),
    }
    assert set(NAMES) == set(expected)
    assert {m.name.split()[0]: m.config for m in parsed(*NAMES)} == expected


def test_results_name_a_method_with_its_options_and_its_budget():
    texts = ("dense", "tidal", "tidal:granularity=kv_head,select_layers=2+6", "quest:page_tokens=8")
    assert [method.name for method in parsed(*texts)] == [
        "dense",
        "tidal 64",
        "tidal:granularity=kv_head,select_layers=2+6 64",
        "quest:page_tokens=8 64",
    ]


def test_options_change_the_configuration_and_nothing_else():
    config = only("tidal:granularity=kv_head,select_layers=2+6")
    assert config == BASE.replace(granularity="kv_head", select_layers=(2, 6))
    assert only("tidal:select_layers=5") == BASE.replace(select_layers=(5,))
    assert only("tidal:select-layers=auto") == BASE.replace(select_layers="auto")
    assert only("tidal:sink-tokens=0,recent-tokens=3") == BASE.replace(
        sink_tokens=0, recent_tokens=3
    )
    assert only("paper:select_layers=2+6").select_layers == (2, 6)
    assert only("lessismore:sink_tokens=1").recent_tokens == 15
    assert only("quest:page_tokens=8,dense_layers=0") == TidalConfig.preset(
        "quest", budget=64, page_tokens=8, dense_layers=0
    )


def test_budgets_multiply_sparse_methods_and_leave_dense_alone():
    found = parsed("dense", "tidal", "streaming", "recent", budgets=[32, 128])
    assert [method.name for method in found] == [
        "dense", "tidal 32", "tidal 128", "streaming 32", "streaming 128", "recent 32", "recent 128",
    ]  # fmt: skip
    assert [m.config.budget for m in found[1:]] == [32, 128] * 3
    assert found[2].config == BASE.replace(budget=128)
    assert found[3].config == TidalConfig.preset("streaming", budget=32)


@pytest.mark.parametrize("name", ["tidal", "streaming", "recent", "quest", "paper", "lessismore"])
def test_a_method_keeps_its_own_budget(name):
    [method] = parsed(f"{name}:budget=48", budgets=[32, 128])
    assert method.name == f"{name} 48"
    assert method.config.budget == 48
    assert method.config == only(name, budgets=[48])


def test_an_own_budget_stands_beside_other_options():
    [method] = parsed("tidal:budget=48,granularity=kv_head", budgets=[32])
    assert method.name == "tidal:granularity=kv_head 48"
    assert method.config == BASE.replace(budget=48, granularity="kv_head")


def test_recent_reads_the_latest_tokens_alone():
    config = only("recent", budgets=[40])
    assert (config.sink_tokens, config.recent_tokens) == (0, 39)
    assert (config.dense_layers, config.select_layers) == (0, ())


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["fast"], r"^method: expected one of dense, tidal, .*, quest, got 'fast'"),
        ([""], r"^method: expected one of dense, .*, got ''"),
        (["Dense"], r"^method: expected one of dense, .*, got 'Dense'"),
        (["tidal:bugdet=3"], r"^option: expected one of budget, .*, got 'bugdet'"),
        (["quest:bugdet=3"], r"^option: expected one of budget, .*, got 'bugdet'"),
        (["tidal:budget"], r"^method: expected option=value after the colon, got 'tidal:budget'"),
        (["tidal:granularity=page"], r"^granularity: expected .*, got 'page'"),
        (
            ["tidal:select_layers=two"],
            r"^select_layers: expected 'auto' or ascending .*, got 'two'",
        ),
        (["tidal:select_layers=2+"], r"^select_layers: expected 'auto' or ascending"),
        (["tidal:select_layers=6+2"], r"^select_layers: expected 'auto' or ascending"),
        (["tidal:budget=lots"], r"^budget: expected a whole number from 1 up, got 'lots'"),
        (["streaming:budget=lots"], r"^budget: expected a whole number from 1 up, got 'lots'"),
        (["tidal:budget=3"], r"^budget: expected at least 16 tokens"),
        (["streaming:recent_tokens=3"], r"^budget: expected sink_tokens \+ recent_tokens \+ 1"),
        (["quest:select_layers=2"], r"^select_layers: expected \(\) where every layer ranks"),
        (["dense:budget=3"], r"^method: expected no options after dense, got 'dense:budget=3'"),
        (["dense", "dense"], r"^method: expected every method once, got dense again"),
        (["tidal", "tidal:budget=64"], r"^method: expected every method once, got tidal 64 again"),
        ([], r"^method: expected at least one, got none"),
    ],
)
def test_what_names_no_method_is_refused(texts, message):
    with pytest.raises(TidalError, match=message):
        parsed(*texts)


def test_a_recent_budget_that_is_no_number_is_refused():
    with pytest.raises(TidalError, match=r"^budget: expected a whole number"):
        parsed("recent:budget=lots")


@pytest.mark.parametrize("budget", [0, 15])
def test_a_budget_that_cannot_work_is_refused(budget):
    with pytest.raises(TidalError, match=r"^budget: expected "):
        parsed("tidal", budgets=[64, budget])
