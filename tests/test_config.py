"""TidalConfig: its defaults, its one file format, and what it refuses."""

import dataclasses
import json
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidaldecode.config import CONFIG_FILE, TidalConfig
from tidaldecode.errors import TidalError


@st.composite
def configs(draw: st.DrawFn) -> TidalConfig:
    """Any configuration that is accepted."""
    if draw(st.integers(0, 5)) == 0:
        return TidalConfig.preset(
            "quest",
            budget=draw(st.integers(1, 5000)),
            dense_layers=draw(st.integers(0, 8)),
            page_tokens=draw(st.integers(1, 64)),
        )
    sinks, recents = draw(st.integers(0, 64)), draw(st.integers(0, 1000))
    spare = draw(st.integers(0, 5000))
    layers = draw(st.one_of(st.just("auto"), st.sets(st.integers(0, 90)).map(sorted).map(tuple)))
    granularity = draw(st.sampled_from(("shared", "kv_head", "query_head")))
    scores = ("softmax", "logits") if granularity == "query_head" else ("softmax",)
    return TidalConfig(
        budget=sinks + recents + 1 + (spare if layers else 0),
        dense_layers=draw(st.integers(0, 8)),
        select_layers=layers,
        granularity=granularity,
        score=draw(st.sampled_from(scores)),
        page_tokens=draw(st.integers(1, 64)),
        sink_tokens=sinks,
        recent_tokens=recents,
        backend=draw(st.sampled_from(("auto", "torch", "triton"))),
        cuda_graph=draw(st.sampled_from(("auto", "compiled", False))),
    )


def test_the_defaults_are_those_that_the_documentation_states():
    assert TidalConfig().to_dict() == {
        "budget": 1024,
        "dense_layers": 2,
        "select_layers": "auto",
        "granularity": "shared",
        "score": "softmax",
        "selector": "attention",
        "page_tokens": 16,
        "sink_tokens": 4,
        "recent_tokens": 15,
        "backend": "auto",
        "mode": "sparse",
        "correct_every": None,
        "draft_tokens": "auto",
        "draft_selection": "round",
        "cuda_graph": "auto",
    }


def test_a_configuration_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TidalConfig().budget = 5


@settings(max_examples=100, deadline=None, derandomize=True)
@given(configs())
def test_any_configuration_survives_a_trip_through_json(config):
    assert TidalConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@settings(max_examples=25, deadline=None, derandomize=True)
@given(configs())
def test_any_configuration_survives_a_trip_through_its_file(config):
    with tempfile.TemporaryDirectory() as directory:
        path = config.save(directory)
        assert path.name == CONFIG_FILE == "tidal_config.json"
        assert TidalConfig.load(directory) == config


@settings(max_examples=50, deadline=None, derandomize=True)
@given(configs())
def test_replacing_nothing_gives_an_equal_configuration_that_hashes_alike(config):
    assert config.replace() == config and hash(config.replace()) == hash(config)


def test_replace_changes_a_copy():
    config = TidalConfig()
    changed = config.replace(budget=64, select_layers=[2, 5])
    assert (changed.budget, changed.select_layers) == (64, (2, 5))
    assert config == TidalConfig()


def test_select_layers_may_be_a_list_and_become_a_tuple():
    assert TidalConfig(select_layers=[2, 13]) == TidalConfig(select_layers=(2, 13))
    assert TidalConfig(select_layers=[2, 13]).to_dict()["select_layers"] == [2, 13]


def test_a_file_with_some_options_leaves_the_others_at_their_defaults(tmp_path):
    (tmp_path / CONFIG_FILE).write_text('{"budget": 99}')
    assert TidalConfig.load(tmp_path) == TidalConfig(budget=99)


@pytest.mark.parametrize(
    "build",
    [
        lambda options: TidalConfig().replace(**options),
        TidalConfig.from_dict,
        lambda options: TidalConfig.preset("paper", **options),
    ],
    ids=["replace", "from_dict", "preset"],
)
def test_an_unknown_option_is_refused_and_the_known_ones_named(build):
    with pytest.raises(TidalError, match=r"^option: expected one of budget, .*, got 'bugdet'$"):
        build({"bugdet": 7})


QUEST = {
    "selector": "page_bounds",
    "select_layers": (),
    "granularity": "query_head",
    "score": "logits",
}
REFUSALS = [
    *(
        ({name: value}, rf"^{name}: expected a whole number from {lowest} up, got ")
        for name, lowest in [
            ("budget", 1),
            ("dense_layers", 0),
            ("sink_tokens", 0),
            ("recent_tokens", 0),
            ("page_tokens", 1),
        ]
        for value in (lowest - 1, 2.0, "7", None, True, float("nan"))
    ),
    *(
        ({"select_layers": value}, r"^select_layers: expected 'auto' or ascending layer numbers")
        for value in (
            "all",
            None,
            5,
            (2, 2),
            (13, 2),
            (-1, 2),
            (2.0,),
            (True,),
            ("2",),
            {2: 3},
            "2,13",
        )
    ),
    *(
        ({name: value}, rf"^{name}: expected .*, got ")
        for name in (
            "granularity",
            "score",
            "selector",
            "backend",
            "cuda_graph",
            "mode",
        )
        for value in ("", "none", 5, None, True, [1])
    ),
    *(
        ({"correct_every": value}, r"^correct_every: expected a whole number from 1 up, got ")
        for value in (0, -1, True, 8.0, "8", "auto", [8])
    ),
    *(
        (
            {"mode": "lossless", "draft_tokens": value},
            r"^draft_tokens: expected 'auto' or a whole number from 1 up, got ",
        )
        for value in (0, -1, True, 4.0, "4", None, [4])
    ),
    (
        {"mode": "lossless", "correct_every": 8},
        r"^correct_every: expected None in lossless mode, .* got 8; leave it out",
    ),
    ({"draft_selection": "token"}, r"^draft_selection: expected 'round' where nothing is drafted"),
    ({"draft_selection": 2}, r"^draft_selection: expected 'round' or 'token', got 2"),
    ({"draft_tokens": 4}, r"^draft_tokens: expected 'auto' where nothing is drafted, got 4 with"),
    (
        {"correct_every": 8, "cuda_graph": "compiled"},
        r"^cuda_graph: expected 'auto' or False with correct_every, .* got 'compiled'",
    ),
    ({"cuda_graph": True}, r"^cuda_graph: expected 'auto' or 'compiled' or False, got True"),
    ({"budget": 19}, r"^budget: expected at least 20 tokens \(sink_tokens=4 \+ recent_tokens=15"),
    (
        {"sink_tokens": 0, "recent_tokens": 1024},
        r"^budget: expected at least 1025 tokens .*, got 1024; raise the budget or lower sink_tokens",
    ),
    (
        {"select_layers": ()},
        r"^budget: expected sink_tokens \+ recent_tokens \+ 1 = 20 where no layer selects",
    ),
    *(
        (
            {"score": "logits", "granularity": granularity},
            rf"^score: expected 'softmax' .*, got 'logits' with granularity='{granularity}'",
        )
        for granularity in ("shared", "kv_head")
    ),
    *(
        (
            {**QUEST, name: value},
            rf"^{name}: expected .* where every layer ranks its own pages.* use preset 'quest'",
        )
        for name, value in [
            ("select_layers", (2,)),
            ("select_layers", "auto"),
            ("granularity", "shared"),
            ("granularity", "kv_head"),
            ("score", "softmax"),
        ]
    ),
]


@pytest.mark.parametrize("options, message", REFUSALS, ids=lambda value: str(value)[:50])
def test_what_cannot_work_is_refused_by_the_name_of_the_option(options, message):
    for build in (
        lambda: TidalConfig(**options),
        lambda: TidalConfig().replace(**options),
        lambda: TidalConfig.from_dict(options),
    ):
        with pytest.raises(TidalError, match=message):
            build()


def test_the_smallest_budget_is_what_is_always_read():
    assert TidalConfig(budget=20).budget == 20
    assert TidalConfig(budget=1, sink_tokens=0, recent_tokens=0).budget == 1
    assert TidalConfig(budget=20, select_layers=()).select_layers == ()


def test_the_paper_preset_ranks_raw_logits_per_query_head_and_forces_nothing():
    config = TidalConfig.preset("paper")
    assert config == TidalConfig(
        granularity="query_head", score="logits", sink_tokens=0, recent_tokens=0
    )


@pytest.mark.parametrize("budget, recents", [(1024, 255), (64, 15), (8, 1), (5, 0)])
def test_the_lessismore_preset_gives_a_quarter_of_the_budget_to_the_latest(budget, recents):
    config = TidalConfig.preset("lessismore", budget=budget)
    assert config == TidalConfig(budget=budget, sink_tokens=4, recent_tokens=recents)


@pytest.mark.parametrize("budget", [5, 64, 1024])
def test_the_streaming_preset_selects_nothing(budget):
    config = TidalConfig.preset("streaming", budget=budget)
    assert (config.dense_layers, config.select_layers) == (0, ())
    assert config.sink_tokens + config.recent_tokens + 1 == config.budget == budget


@pytest.mark.parametrize("budget", [1, 64, 1024])
def test_the_quest_preset_ranks_pages_of_16_for_every_query_head_and_forces_nothing(budget):
    config = TidalConfig.preset("quest", budget=budget)
    assert config == TidalConfig(budget=budget, sink_tokens=0, recent_tokens=0, **QUEST)
    assert (config.dense_layers, config.page_tokens) == (2, 16)


def test_a_preset_yields_to_overrides():
    config = TidalConfig.preset("paper", budget=128, select_layers=(2, 13), sink_tokens=4)
    assert (config.budget, config.select_layers, config.sink_tokens) == (128, (2, 13), 4)
    assert config.score == "logits"


def test_an_unknown_preset_is_refused():
    with pytest.raises(TidalError, match=r"^preset: expected one of paper, .*quest, got 'snap'"):
        TidalConfig.preset("snap")


@pytest.mark.parametrize(
    "name, budget", [("streaming", 4), ("lessismore", 4), ("paper", 0), ("quest", 0)]
)
def test_a_preset_with_too_small_a_budget_is_refused(name, budget):
    with pytest.raises(TidalError, match=r"^(budget|recent_tokens): expected "):
        TidalConfig.preset(name, budget=budget)


@pytest.mark.parametrize("name", ["paper", "lessismore", "streaming", "quest"])
@pytest.mark.parametrize("budget", ["64", None])
def test_a_preset_with_a_budget_that_is_no_number_is_refused(name, budget):
    with pytest.raises(TidalError, match=r"^budget: expected a whole number"):
        TidalConfig.preset(name, budget=budget)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "expected a readable JSON file, got: .*No such file"),
        ("{", "expected a readable JSON file, got: "),
        (b"\xff\xfe", "expected a readable JSON file, got: "),
        ("[1]", "expected a JSON object, got list"),
        ('{"budget": 3}', "budget: expected at least 20 tokens"),
        ('{"bugdet": 3}', "option: expected one of .*, got 'bugdet'"),
        ('{"select_layers": [3, 2]}', "select_layers: expected "),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_its_path(tmp_path, content, message):
    if content is not None:
        path = tmp_path / CONFIG_FILE
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TidalError, match=rf"tidal_config\.json: {message}") as refusal:
        TidalConfig.load(tmp_path)
    assert str(refusal.value).startswith(str(tmp_path))


def test_a_zero_is_not_false():
    with pytest.raises(TidalError, match=r"^cuda_graph: expected"):
        TidalConfig(cuda_graph=0)
