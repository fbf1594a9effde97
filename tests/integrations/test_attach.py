"""Attaching leaves no trace, keeps runs apart, and finds its settings."""

from __future__ import annotations

import copy
import json
import threading

import pytest
import torch
from runs import SMALL, generate, logits_of
from snapshot import snapshot
from tiny import build, prompt
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import tidaldecode
from tidaldecode import LayerPlan, TidalConfig, TidalError, TidalHandle
from tidaldecode.integrations.transformers.attention import Forward, tidal_attention_forward

PROMPT = 24


def test_a_handle_restores_the_model_exactly():
    model = build("Llama")
    before = snapshot(model)
    handle = tidaldecode.enable(model, **SMALL)
    assert isinstance(handle, TidalHandle)
    assert model.config._attn_implementation == "tidal"
    generate(model, prompt(PROMPT))
    assert snapshot(model) != before
    handle.disable()
    assert model.config._attn_implementation == "sdpa"
    assert snapshot(model) == before


def test_disable_finds_the_handle_on_the_model():
    model = build("Gemma3")
    before = snapshot(model)
    tidaldecode.enable(model, **SMALL)
    tidaldecode.disable(model)
    assert snapshot(model) == before


def test_disabling_twice_does_nothing():
    model = build("Llama")
    before = snapshot(model)
    handle = tidaldecode.enable(model, **SMALL)
    for _ in range(2):
        handle.disable()
        tidaldecode.disable(model)
        assert snapshot(model) == before


def test_disabling_an_old_handle_leaves_a_new_one_on():
    model = build("Llama")
    old = tidaldecode.enable(model, **SMALL)
    old.disable()
    with tidaldecode.enable(model, **SMALL) as new:
        enabled = snapshot(model)
        old.disable()
        assert snapshot(model) == enabled
        assert new.plan == old.plan
    assert model.config._attn_implementation == "sdpa"


def test_hooks_of_others_stay():
    model = build("Llama")
    seen = []
    model.get_decoder().register_forward_hook(lambda *_: seen.append(1))
    before = snapshot(model)
    with tidaldecode.enable(model, **SMALL):
        generate(model, prompt(PROMPT), 3)
    assert snapshot(model) == before
    assert len(seen) == 3


def test_an_exception_inside_the_context_restores_the_model():
    model = build("Llama")
    expected = generate(model, prompt(PROMPT))
    before = snapshot(model)

    def stop(input_ids, scores):
        raise RuntimeError("stopped in the middle of generate")

    with (
        pytest.raises(RuntimeError, match="in the middle"),
        tidaldecode.enable(model, **SMALL),
    ):
        generate(model, prompt(PROMPT), stopping_criteria=[stop])
    assert snapshot(model) == before
    assert torch.equal(logits_of(generate(model, prompt(PROMPT))), logits_of(expected))


def test_an_exception_inside_a_layer_does_not_spoil_the_next_run():
    model = build("Llama")
    with tidaldecode.enable(model, **SMALL):
        expected = generate(model, prompt(PROMPT))
        layer = model.model.layers[5].mlp

        def fail(*_):
            raise RuntimeError("a layer failed")

        hook = layer.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="a layer failed"):
            generate(model, prompt(PROMPT))
        hook.remove()
        found = generate(model, prompt(PROMPT))
    assert torch.equal(logits_of(found), logits_of(expected))


def test_enabling_twice_is_refused_and_changes_nothing():
    model = build("Llama")
    with tidaldecode.enable(model, **SMALL):
        enabled = snapshot(model)
        with pytest.raises(TidalError, match="enabled already"):
            tidaldecode.enable(model, budget=100)
        assert snapshot(model) == enabled


def test_a_model_can_be_enabled_again_with_other_settings():
    model = build("Llama")
    with tidaldecode.enable(model, **SMALL):
        first = generate(model, prompt(PROMPT))
    with tidaldecode.enable(model, budget=16, sink_tokens=0, recent_tokens=0) as handle:
        second = generate(model, prompt(PROMPT))
    assert handle.config.budget == 16
    assert not torch.equal(first.logits[1], second.logits[1])


def test_a_base_model_without_a_head_can_be_enabled():
    decoder = build("Llama").get_decoder()
    before = snapshot(decoder)
    ids = prompt(PROMPT)

    @torch.no_grad()
    def step():
        past = decoder(ids[:, :-1], use_cache=True).past_key_values
        return decoder(ids[:, -1:], past_key_values=past).last_hidden_state

    dense = step()
    with tidaldecode.enable(decoder, **SMALL):
        sparse = step()
    assert not torch.equal(dense, sparse)
    assert snapshot(decoder) == before


def test_a_copy_of_an_enabled_model_is_enabled_on_its_own():
    model = build("Llama")
    handle = tidaldecode.enable(model, **SMALL)
    expected = generate(model, prompt(PROMPT))
    twin = copy.deepcopy(model)
    handle.disable()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits_of(generate(twin, prompt(PROMPT))), logits_of(expected))
    tidaldecode.disable(twin)
    assert twin.config._attn_implementation == "sdpa"
    dense = logits_of(generate(model, prompt(PROMPT)))
    assert torch.equal(logits_of(generate(twin, prompt(PROMPT))), dense)


def test_the_handle_shows_what_it_does():
    with tidaldecode.enable(build("Llama"), **SMALL) as handle:
        text = repr(handle)
    for part in ("LlamaForCausalLM", "DDSS....", "budget=8", "'shared'"):
        assert part in text


def run_together(*jobs) -> list[torch.Tensor]:
    """Results of jobs that start at once, each in its own thread."""
    results, start = [None] * len(jobs), threading.Barrier(len(jobs))

    def work(index):
        start.wait()
        results[index] = jobs[index]()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_that_share_a_model_do_not_mix():
    model = build("Llama")
    prompts = [prompt(10 + 7 * index, batch=1 + index % 2, seed=index) for index in range(4)]

    def job(ids):
        return lambda: generate(model, ids, 12)

    with tidaldecode.enable(model, **SMALL):
        alone = [job(ids)() for ids in prompts]
        for _ in range(2):
            together = run_together(*map(job, prompts))
            for found, expected in zip(together, alone, strict=True):
                assert torch.equal(found.sequences, expected.sequences)
                torch.testing.assert_close(logits_of(found), logits_of(expected))


def test_two_models_with_different_settings_do_not_mix():
    ids, families = prompt(PROMPT), ["Llama", "Qwen3", "Llama"]
    options = [SMALL, {**SMALL, "granularity": "query_head"}, {**SMALL, "budget": 4}]
    models = [build(family) for family in families]
    alone = []
    for model, settings in zip(models, options, strict=True):
        with tidaldecode.enable(model, **settings):
            alone.append(generate(model, ids, 12))
    handles = [
        tidaldecode.enable(model, **settings)
        for model, settings in zip(models, options, strict=True)
    ]
    in_turn = [generate(model, ids, 12) for model in models]
    together = run_together(*(lambda m=model: generate(m, ids, 12) for model in models))
    for handle in handles:
        handle.disable()
    for results in (in_turn, together):
        for found, expected in zip(results, alone, strict=True):
            assert torch.equal(found.sequences, expected.sequences)
            torch.testing.assert_close(logits_of(found), logits_of(expected))
    assert not torch.equal(alone[0].logits[1], alone[2].logits[1])


def test_a_model_that_is_not_enabled_is_untouched_beside_one_that_is():
    plain, enabled = build("Llama"), build("Llama")
    expected = generate(plain, prompt(PROMPT))
    before = snapshot(plain)
    with tidaldecode.enable(enabled, **SMALL):
        generate(enabled, prompt(PROMPT))
        found = generate(plain, prompt(PROMPT))
        assert snapshot(plain) == before
    assert torch.equal(logits_of(found), logits_of(expected))


def test_random_numbers_are_drawn_as_without_us():
    model = build("Llama")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with tidaldecode.enable(model, **SMALL):
        generate(model, prompt(PROMPT))
    assert torch.equal(torch.get_rng_state(), state)


def test_saving_an_enabled_model_stores_nothing_of_ours(tmp_path):
    model = build("Llama")
    expected = generate(model, prompt(PROMPT))
    with tidaldecode.enable(model, **SMALL):
        model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.json"):
        assert "tidal" not in file.read_text(encoding="utf-8")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(logits_of(generate(loaded, prompt(PROMPT))), logits_of(expected))
    with tidaldecode.enable(loaded, **SMALL):
        assert not torch.equal(generate(loaded, prompt(PROMPT)).logits[1], expected.logits[1])


def gradients(model, ids, past=None):
    model.zero_grad()
    model(ids, past_key_values=past).logits.square().sum().backward()
    return {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("length", [1, PROMPT])
def test_gradients_are_those_of_sdpa(length):
    model, ids = build("Llama"), prompt(length)
    expected = gradients(model, ids)
    with tidaldecode.enable(model, **SMALL):
        found = gradients(model, ids)
    assert expected["model.layers.7.self_attn.v_proj.weight"].abs().max() > 0
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_training_drops_out_as_sdpa_does():
    model = build("Llama", attention_dropout=0.5).train()

    def train():
        torch.manual_seed(5)
        return gradients(model, prompt(PROMPT))

    expected = train()
    with tidaldecode.enable(model, **SMALL):
        found = train()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_every_keyword_of_a_layer_reaches_the_host():
    layer = build("Llama").model.layers[5].self_attn
    plan = LayerPlan.build(8, dense_layers=2, select_layers=(2, 4))
    query, key, value = torch.randn(1, 4, 6, 16), torch.randn(1, 2, 6, 16), torch.randn(1, 2, 6, 16)
    call = (layer, query, key, value, None)
    both_ways, _ = sdpa_attention_forward(*call, is_causal=False)
    causal, _ = sdpa_attention_forward(*call)
    ours = Forward(TidalConfig(**SMALL), plan)
    found, _ = tidal_attention_forward(*call, tidal_forward=ours, is_causal=False)
    assert torch.equal(found, both_ways)
    assert not torch.equal(found, causal)


def test_one_token_after_a_cache_has_the_gradients_of_sdpa():
    model, ids = build("Llama"), prompt(PROMPT)

    def after_a_cache():
        with torch.no_grad():
            past = model(ids[:, :-1], past_key_values=DynamicCache(config=model.config))
        return gradients(model, ids[:, -1:], past.past_key_values)

    expected = after_a_cache()
    with tidaldecode.enable(model, **SMALL):
        found = after_a_cache()
    assert expected["model.layers.7.self_attn.q_proj.weight"].abs().max() > 0
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


# Which settings a model gets.


@pytest.fixture
def calibrated(tmp_path):
    """A model loaded from a folder with a `tidal_config.json`."""
    build("Llama").save_pretrained(tmp_path)
    TidalConfig(select_layers=(2, 5), **SMALL).save(tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_file_beside_the_model_is_used(calibrated, tmp_path):
    with tidaldecode.enable(calibrated) as handle:
        assert handle.config == TidalConfig.load(tmp_path)
        assert str(handle.plan) == "DDS..S.."
    assert handle.reason == f"calibrated: {tmp_path / 'tidal_config.json'}"


def test_overrides_win_over_the_file(calibrated):
    with tidaldecode.enable(calibrated, budget=12) as handle:
        assert (handle.config.budget, handle.config.sink_tokens) == (12, 1)
        assert str(handle.plan) == "DDS..S.."
    assert handle.reason.startswith("calibrated")
    with tidaldecode.enable(calibrated, select_layers=(2, 3)) as handle:
        assert str(handle.plan) == "DDSS...."
    assert handle.reason == "given"


def test_a_given_configuration_takes_only_its_open_layers_from_the_file(calibrated):
    with tidaldecode.enable(calibrated, TidalConfig(budget=99)) as handle:
        assert handle.config == TidalConfig(budget=99, select_layers=(2, 5))
    assert handle.reason.startswith("calibrated")
    with tidaldecode.enable(calibrated, TidalConfig(select_layers=(2, 4))) as handle:
        assert str(handle.plan) == "DDS.S..."
    assert handle.reason == "given"


def test_a_file_that_leaves_the_layers_open_gets_the_rule_of_thumb(calibrated, tmp_path):
    TidalConfig(budget=77).save(tmp_path)
    with tidaldecode.enable(calibrated) as handle:
        assert handle.config.budget == 77
    assert handle.reason.startswith("rule of thumb")


@pytest.mark.parametrize("text", ["{", "[1]", '{"budgets": 3}', '{"budget": 0}'])
def test_a_broken_file_is_refused_by_name(calibrated, tmp_path, text):
    (tmp_path / "tidal_config.json").write_text(text, encoding="utf-8")
    before = snapshot(calibrated)
    with pytest.raises(TidalError, match=r"tidal_config\.json"):
        tidaldecode.enable(calibrated)
    assert snapshot(calibrated) == before


def test_overrides_win_over_a_given_configuration():
    config = TidalConfig(budget=64, granularity="kv_head")
    with tidaldecode.enable(build("Llama"), config, budget=32) as handle:
        assert (handle.config.budget, handle.config.granularity) == (32, "kv_head")
    assert config.budget == 64


def test_without_settings_the_defaults_and_the_rule_of_thumb_hold():
    model = build("Llama", num_hidden_layers=32)
    with tidaldecode.enable(model) as handle:
        layers = handle.config.select_layers
        assert handle.config == TidalConfig(select_layers=layers)
    assert layers == (2, 13)
    assert handle.reason.startswith("rule of thumb")


@pytest.mark.parametrize(
    ("vocabulary", "layers", "reason"),
    [(32000, (2, 7), "Llama-2-7B"), (128256, (2, 13), "Llama-3-8B"), (9, (2, 13), "rule of thumb")],
)
def test_published_layers_are_found_by_the_shape_of_the_model(vocabulary, layers, reason):
    config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=32, hidden_size=4096)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    with tidaldecode.enable(model) as handle:
        assert handle.config.select_layers == layers
    assert reason in handle.reason
    with tidaldecode.enable(model, select_layers=(2, 20)) as handle:
        assert handle.reason == "given"


def test_settings_are_plain_data_that_a_record_can_hold():
    with tidaldecode.enable(build("Llama"), **SMALL) as handle:
        values = json.loads(json.dumps(handle.config.to_dict()))
    assert TidalConfig.from_dict(values) == handle.config
