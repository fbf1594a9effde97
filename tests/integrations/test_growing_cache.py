"""Dynamic caches of an enabled model grow in place, and otherwise hold what transformers' own would."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import SMALL
from tiny import build, prompt
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

import tidaldecode
from tidaldecode.integrations.transformers.growing_cache import GrowingLayer, grow_in_place

ROOM = 1024
"""More than a layer keeps free."""

ACTIONS = st.one_of(
    st.tuples(st.just("update"), st.sampled_from([1, 1, 1, 2, 7, 140])),
    st.tuples(st.just("crop"), st.integers(1, 5)),
    st.tuples(st.just("reorder_cache"), st.integers(0, 5)),
    st.tuples(st.just("batch_repeat_interleave"), st.just(2)),
    st.tuples(st.just("batch_select_indices"), st.integers(0, 5)),
    st.tuples(st.just("deepcopy"), st.just(0)),
    st.tuples(st.just("reset"), st.just(0)),
)


def act(layer: DynamicLayer, action: str, amount: int, seed: int) -> DynamicLayer:
    """One thing that a cache's owner may do; returns the layer to go on with."""
    if action == "deepcopy":
        return copy.deepcopy(layer)
    if action == "update":
        batch = 2 if layer.keys is None or not layer.keys.numel() else len(layer.keys)
        random = torch.Generator().manual_seed(seed)
        new = (torch.randn(batch, 3, amount, size, generator=random) for size in (4, 6))
        shown = layer.update(*new)
        assert shown[0] is layer.keys and shown[1] is layer.values
    elif action == "reset":
        layer.reset()
    elif layer.get_seq_length() > 0:
        rows = len(layer.keys)
        if action == "crop":
            if layer.get_seq_length() > amount:
                layer.crop(-amount)
        elif action == "batch_repeat_interleave":
            layer.batch_repeat_interleave(amount if rows < 8 else 1)
        else:
            getattr(layer, action)(torch.arange(rows) * amount % rows)
    return layer


@pytest.fixture(autouse=True)
def _without_gradients():
    """As in generate."""
    with torch.no_grad():
        yield


@settings(max_examples=60)
@given(st.lists(ACTIONS, min_size=1, max_size=14))
def test_a_layer_holds_what_the_hosts_does(actions):
    mine, host = GrowingLayer(), DynamicLayer()
    for seed, (action, amount) in enumerate(actions):
        mine, host = act(mine, action, amount, seed), act(host, action, amount, seed)
        assert mine.get_seq_length() == host.get_seq_length()
        if host.get_seq_length():
            assert torch.equal(mine.keys, host.keys) and torch.equal(mine.values, host.values)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_and_its_original_go_their_own_ways(copied):
    layer = GrowingLayer()
    act(layer, "update", 5, 0)
    twin = copied(layer)
    act(layer, "update", 1, 1)
    act(twin, "update", 1, 2)
    assert torch.equal(layer.keys[:, :, :5], twin.keys[:, :, :5])
    assert not torch.equal(layer.keys[:, :, 5], twin.keys[:, :, 5])


EXCHANGES = {
    "another layer's": lambda own, other: other,
    "the first row": lambda own, other: own[:1],
    "every other token": lambda own, other: own[:, :, ::2],
    "the later tokens": lambda own, other: own[:, :, 2:],
}


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_tensors_that_were_exchanged_are_taken_as_they_are(exchange):
    layer = GrowingLayer()
    act(layer, "update", 6, 0)
    twin = copy.deepcopy(layer)
    twin.keys.neg_(), twin.values.neg_()
    layer.keys, layer.values = (
        EXCHANGES[exchange](own, other)
        for own, other in ((layer.keys, twin.keys), (layer.values, twin.values))
    )
    before = layer.keys.clone(), layer.values.clone()
    act(layer, "update", 1, 1)
    assert torch.equal(layer.keys[:, :, :-1], before[0])
    assert torch.equal(layer.values[:, :, :-1], before[1])


def test_what_was_shown_is_never_overwritten():
    layer = GrowingLayer()
    act(layer, "update", 9, 0)
    kept = layer.keys, layer.values
    before = [states.clone() for states in kept]
    layer.crop(-4)
    act(layer, "update", 4, 1)
    assert all(torch.equal(*pair) for pair in zip(kept, before, strict=True))
    layer.keys, layer.values = kept
    act(layer, "update", 1, 2)
    assert torch.equal(layer.keys[:, :, :9], before[0])


@pytest.mark.parametrize("action", ["reorder_cache", "batch_select_indices", "crop"])
def test_memory_that_is_left_is_given_back(action):
    layer = GrowingLayer()
    act(layer, "update", 600, 0)
    memory = StorageWeakRef(layer.keys.untyped_storage())
    act(layer, action, 1, 1)
    assert memory.expired() == (action != "crop")
    act(layer, "update", 1, 2)
    assert memory.expired()


@pytest.mark.parametrize(
    "new",
    [torch.ones(1, 3, 2, 4), torch.ones(2, 1, 2, 4), torch.ones(2, 3, 2, 5)],
    ids=["rows", "heads", "size"],
)
def test_tokens_that_do_not_belong_are_refused_as_the_host_does(new):
    layer, host = GrowingLayer(), DynamicLayer()
    for one in (layer, host):
        act(one, "update", 3, 0)
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            one.update(new, torch.ones(2, 3, 2, 6))


def test_other_numbers_are_promoted_as_the_host_does():
    layer, host = GrowingLayer(), DynamicLayer()
    for one in (layer, host):
        act(one, "update", 3, 0)
        one.update(torch.ones(2, 3, 1, 4).half(), torch.ones(2, 3, 1, 6).double())
    assert (layer.keys.dtype, layer.values.dtype) == (torch.float32, torch.float64)
    assert torch.equal(layer.keys, host.keys) and torch.equal(layer.values, host.values)


def test_more_tokens_than_there_is_room_for():
    layer, host = GrowingLayer(), DynamicLayer()
    for seed, amount in enumerate((3, 128, 1, 200)):
        act(layer, "update", amount, seed), act(host, "update", amount, seed)
        assert torch.equal(layer.keys, host.keys) and torch.equal(layer.values, host.values)


def test_a_layer_moves_only_when_it_is_full():
    layer = GrowingLayer()
    act(layer, "update", 100, 0)
    places = set()
    for seed in range(2 * ROOM):
        act(layer, "update", 1, seed)
        places.add(layer.keys.data_ptr())
    assert len(places) <= 16
    spare = layer.keys.untyped_storage().nbytes() // (2 * 3 * 4 * 4) - layer.get_seq_length()
    assert 0 <= spare <= ROOM


def steps(model, cache, ids, count=5):
    """Logits of ``count`` tokens fed one by one, and where the first layer's keys were."""
    logits, places = [], []
    for at in range(count):
        logits.append(model(ids[:, at : at + 1], past_key_values=cache).logits[:, -1])
        places.append(cache.layers[0].keys.data_ptr())
    return torch.stack(logits), places


def test_an_enabled_model_decodes_without_copies_and_bit_for_bit():
    model = build("Llama")
    ids = prompt(30, 2)
    own, grown = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for cache in (own, grown):
        model(ids[:, :25], past_key_values=cache)
    expected, copied = steps(model, own, ids[:, 25:])
    with tidaldecode.enable(model, budget=64):
        found, places = steps(model, grown, ids[:, 25:])
    assert torch.equal(found, expected)
    assert len(set(places)) == 1 and len(set(copied)) > 1


def test_a_cache_outlives_the_handle():
    model = build("Llama")
    ids = prompt(30)
    cache = DynamicCache(config=model.config)
    with tidaldecode.enable(model, budget=64):
        model(ids[:, :25], past_key_values=cache)
    found, _ = steps(model, cache, ids[:, 25:])
    whole = model(ids).logits[0, 25:]
    torch.testing.assert_close(found[:, 0], whole, atol=1e-4, rtol=1e-4)


def test_what_inference_mode_cached_is_continued_outside():
    model = build("Llama")
    ids = prompt(30)
    cache = DynamicCache(config=model.config)
    with tidaldecode.enable(model, **SMALL):
        with torch.inference_mode():
            model(ids[:, :25], past_key_values=cache)
        logits, places = steps(model, cache, ids[:, 25:])
    assert logits.isfinite().all() and len(set(places)) == 1


@pytest.mark.parametrize("trained", ["", "q_proj"], ids=["all weights", "queries alone"])
def test_gradients_flow_through_a_cache(trained):
    model = build("Llama")
    for name, weight in model.named_parameters():
        weight.requires_grad_(trained in name)
    ids = prompt(12)
    cache = DynamicCache(config=model.config)
    with torch.enable_grad(), tidaldecode.enable(model, budget=64):
        first = model(ids[:, :8], past_key_values=cache)
        second = model(ids[:, 8:], past_key_values=cache)
        (first.logits.sum() + second.logits.sum()).backward()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    assert weights and all(weight.grad is not None for weight in weights)


def test_layers_that_are_not_dynamic_stay(monkeypatch):
    gemma = build("Gemma3").config
    mixed = DynamicCache(config=gemma)
    before = [type(layer) for layer in mixed.layers]
    grow_in_place(mixed)
    for layer, kind in zip(mixed.layers, before, strict=True):
        assert type(layer) is (GrowingLayer if kind is DynamicLayer else kind)
    assert len({type(layer) for layer in mixed.layers}) == 2
    static = StaticCache(config=build("Llama").config, max_cache_len=16)
    kinds = [type(layer) for layer in static.layers]
    grow_in_place(static)
    assert [type(layer) for layer in static.layers] == kinds

    class Special(DynamicCache):
        """Whoever derives a cache knows what its layers are."""

    special, away = Special(), DynamicCache()
    monkeypatch.setattr(away, "offloading", True)
    for cache in (special, away):
        grow_in_place(cache)
        assert cache.layer_class_to_replicate is DynamicLayer
    grow_in_place(None)


@pytest.mark.parametrize("filled", [False, True])
def test_a_cache_without_a_configuration_grows_too(filled):
    cache = DynamicCache()
    new = torch.randn(1, 2, 3, 4)
    if filled:
        cache.update(new, new, 0)
    grow_in_place(cache)
    cache.update(new, new, 0)
    cache.update(new, new, 1)
    assert [type(layer) for layer in cache.layers] == [GrowingLayer, GrowingLayer]
    assert cache.get_seq_length() == (6 if filled else 3)
