"""The engine: batches of any lengths, scripts with free tokens, and a cache left as it was."""

import copy
import random

import pytest
import torch
from tiny import VOCABULARY, build

from tidaldecode import TidalConfig, TidalError, enable
from tidaldecode.integrations.transformers.engine import TransformersEngine

CONFIG = TidalConfig(budget=10, select_layers=(2, 4), sink_tokens=1, recent_tokens=3)
CONFIGS = {
    "dense": None,
    "tidal": CONFIG,
    "streaming": TidalConfig.preset("streaming", budget=10),
    "quest": TidalConfig.preset("quest", budget=10, page_tokens=4),
}
LENGTHS = (33, 1, 20, 12)


def tokens_of(length: int, seed: int) -> list[int]:
    return [random.Random(f"{seed}/{i}").randrange(VOCABULARY) for i in range(length)]


ROWS = [tokens_of(length, seed) for seed, length in enumerate(LENGTHS)]
SCRIPTS = [
    [*tokens_of(3, 10), None, *tokens_of(2, 11), None, None],
    [*tokens_of(7, 12)],
    [*tokens_of(1, 13)],
    [*tokens_of(2, 14), None, None, None, 5, None],
]


@pytest.fixture(scope="module")
def model():
    return build("Llama")


@pytest.fixture
def engine(model):
    made = TransformersEngine(model)
    made.prefill(ROWS)
    return made


def logits_of(engine, scripts=SCRIPTS, config=CONFIG) -> torch.Tensor:
    """``[steps, B, vocabulary]``."""
    return torch.stack([step.logits for step in engine.steps(scripts, config)])


def held(engine) -> list[torch.Tensor]:
    return [part.clone() for layer in engine._cache.layers for part in (layer.keys, layer.values)]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_ragged_batch_equals_each_of_its_rows_alone(model, engine, name):
    together = logits_of(engine, config=CONFIGS[name])
    assert together.shape == (8, 4, VOCABULARY)
    alone = TransformersEngine(model)
    for index, (row, script) in enumerate(zip(ROWS, SCRIPTS, strict=True)):
        alone.prefill([row])
        # Alone, a row ends with its own script; in the batch it goes on greedily.
        longer = [*script, *[None] * (8 - len(script))]
        expected = logits_of(alone, [longer], CONFIGS[name])
        torch.testing.assert_close(together[:, index : index + 1], expected, atol=2e-4, rtol=2e-4)


def test_full_attention_is_the_models_own_forward_pass(model):
    engine = TransformersEngine(model)
    row, script = tokens_of(30, 1), tokens_of(9, 2)
    engine.prefill([row])
    with torch.no_grad():
        expected = model(torch.tensor([row + script])).logits[0, 30:]
    torch.testing.assert_close(
        logits_of(engine, [script], None)[:, 0], expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["tidal", "streaming", "quest"])
def test_a_method_is_the_enabled_models_own_decoding(model, name):
    engine = TransformersEngine(model)
    row, script = tokens_of(30, 1), tokens_of(9, 2)
    engine.prefill([row])
    found = logits_of(engine, [script], CONFIGS[name])[:, 0]
    with torch.no_grad():
        cache = model(torch.tensor([row])).past_key_values
        with enable(model, CONFIGS[name]):
            expected = torch.cat(
                [model(torch.tensor([[t]]), past_key_values=cache).logits[0] for t in script]
            )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, logits_of(engine, [script], None)[:, 0], atol=1e-2)


def test_a_free_place_is_fed_the_likeliest_token_so_far(model, engine):
    free = list(engine.steps(SCRIPTS, CONFIG))
    filled = [
        [
            free[index - 1].tokens[row] if token is None else token
            for index, token in enumerate([*script, *[None] * (8 - len(script))])
        ]
        for row, script in enumerate(SCRIPTS)
    ]
    forced = list(engine.steps(filled, CONFIG))
    for one, other in zip(free, forced, strict=True):
        assert torch.equal(one.logits, other.logits) and one.tokens == other.tokens
        assert one.tokens == one.logits.argmax(-1).tolist()
        assert one.logits.dtype == torch.float32 and one.seconds > 0
    other_token = [*filled[0][:3], (filled[0][3] + 1) % VOCABULARY, *filled[0][4:]]
    changed = logits_of(engine, [other_token, *filled[1:]])
    assert torch.equal(changed[:3], torch.stack([step.logits for step in free[:3]]))
    assert not torch.equal(changed[3, 0], free[3].logits[0])


def test_there_are_as_many_steps_as_the_longest_script_has(engine):
    assert len(list(engine.steps([[1], [1], [1], [1]], None))) == 1
    assert len(list(engine.steps([[1], [1] * 5, [1], [1, 2]], None))) == 5


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_leave_the_prefill_as_it_was_also_when_stopped_early(engine, name):
    before, first = held(engine), logits_of(engine, config=CONFIGS[name])
    steps = engine.steps(SCRIPTS, CONFIGS[name])
    next(steps)
    next(steps)
    steps.close()
    after = held(engine)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert torch.equal(logits_of(engine, config=CONFIGS[name]), first)
    assert torch.equal(logits_of(engine, config=None), logits_of(engine, config=None))


def test_a_prefill_replaces_the_batch_before(model, engine):
    engine.prefill(ROWS[:1])
    alone = TransformersEngine(model)
    alone.prefill(ROWS[:1])
    assert torch.equal(logits_of(engine, SCRIPTS[:1]), logits_of(alone, SCRIPTS[:1]))


def test_scores_of_every_selection_layer_of_every_step_are_seen(engine):
    seen = []
    steps = engine.steps(SCRIPTS, CONFIG, lambda layer, scores: seen.append((layer, scores.shape)))
    assert len(list(steps)) == 8
    assert seen == [(layer, (4, 1, 33 + index + 1)) for index in range(8) for layer in (2, 4)]
    seen.clear()
    logits_of(engine)
    assert not seen


def test_the_model_is_as_before_afterwards(model, engine):
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        before = model(ids).logits
        for _ in engine.steps(SCRIPTS, CONFIG):
            break
        logits_of(engine)
        assert torch.equal(model(ids).logits, before)
    with enable(model, CONFIG):  # would refuse a model that is enabled still
        pass


@pytest.mark.parametrize("config", [None, CONFIG], ids=["dense", "tidal"])
def test_a_model_that_gives_nan_is_refused_and_can_be_tried_again(model, config):
    broken = copy.deepcopy(model)
    engine = TransformersEngine(broken)
    engine.prefill(ROWS)
    before = held(engine)
    with torch.no_grad():
        broken.lm_head.weight[7] = float("nan")
    with pytest.raises(TidalError, match=r"^logits: expected numbers, got NaN at decode step 1; "):
        logits_of(engine, config=config)
    assert all(torch.equal(old, new) for old, new in zip(before, held(engine), strict=True))
    with torch.no_grad():
        broken.lm_head.weight.copy_(model.lm_head.weight)
    good = TransformersEngine(model)
    good.prefill(ROWS)
    assert torch.equal(logits_of(engine, config=config), logits_of(good, config=config))


@pytest.mark.parametrize("rows", [[], [[]], [[1, 2], []]])
def test_an_empty_batch_or_row_is_refused(model, rows):
    with pytest.raises(
        TidalError, match=r"^prefill: expected at least one row and a token in each"
    ):
        TransformersEngine(model).prefill(rows)


@pytest.mark.parametrize(
    "scripts", [SCRIPTS[:3], [*SCRIPTS, [1]], [[None, 1], *SCRIPTS[1:]], [[], *SCRIPTS[1:]], []]
)
def test_scripts_that_do_not_match_the_batch_are_refused(engine, scripts):
    with pytest.raises(
        TidalError, match=r"^scripts: expected one for each of 4 rows, with a token"
    ):
        list(engine.steps(scripts, None))


def test_the_engine_needs_something_to_start_from(model):
    with pytest.raises(TidalError, match=r"^steps: expected a prefilled batch, found none"):
        next(TransformersEngine(model).steps([[1]], None))
