"""What cannot work is refused by name, and leaves the model as it was."""

from __future__ import annotations

import math

import pytest
import torch
from runs import SMALL, generate, left_padded, logits_of
from snapshot import snapshot
from tiny import build, prompt
from transformers import (
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import tidaldecode
from tidaldecode import LayerPlan, TidalConfig, TidalError
from tidaldecode.integrations.transformers.attention import Forward, tidal_attention_forward

PROMPT = 24


def refuse(model: torch.nn.Module, *named: str, **options) -> None:
    """Expect `enable` to raise, to name what it found, and to change nothing."""
    before = snapshot(model)
    with pytest.raises(TidalError) as caught:
        tidaldecode.enable(model, **options)
    for part in named:
        assert part in str(caught.value)
    assert snapshot(model) == before


def refuse_to_run(model: torch.nn.Module, *named: str, call) -> None:
    """As `refuse`, for what only a forward pass can find out."""
    before = snapshot(model)
    with pytest.raises(TidalError) as caught, tidaldecode.enable(model, **SMALL):
        call(model)
    for part in named:
        assert part in str(caught.value)
    assert snapshot(model) == before


def decode(model: torch.nn.Module) -> None:
    generate(model, prompt(PROMPT), 3)


# Models.


def test_soft_capping_is_refused():
    refuse(build("Gemma2"), "Gemma2ForCausalLM", "soft-capping", "attn_logit_softcapping=50.0")


def test_learned_attention_sinks_are_refused():
    refuse(build("GptOss"), "GptOssForCausalLM", "learned attention sinks")


def test_multi_head_latent_attention_is_refused():
    refuse(build("DeepseekV3"), "DeepseekV3ForCausalLM", "multi-head latent attention")


def test_models_that_drop_keyword_arguments_are_refused_when_they_run():
    refuse_to_run(build("StableLm"), "StableLmAttention", "drops them", call=decode)
    # Of Nemotron, transformers 5.4 already refuses to change the attention implementation.
    refuse_to_run(build("Nemotron"), "Nemotron", "cannot", call=decode)


def test_models_off_the_attention_interface_are_refused():
    refuse(build("Falcon"), "attention interface", "FalconModel")


class OwnAttention(torch.nn.Module):
    """The attention of a Llama layer, save that it never asks the interface which function to call."""

    def __init__(self, host):
        super().__init__()
        self.host = host

    def forward(self, hidden_states, position_embeddings, past_key_values=None, **kwargs):
        query, key, value = (
            part(hidden_states).unflatten(-1, (-1, 16)).transpose(1, 2)
            for part in (self.host.q_proj, self.host.k_proj, self.host.v_proj)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.host.layer_idx)
        out, _ = sdpa_attention_forward(self.host, query, key, value, kwargs["attention_mask"])
        return self.host.o_proj(out.flatten(2)), None


def test_models_that_never_call_the_registered_function_are_refused_when_they_run():
    model = build("Llama")
    for layer in model.model.layers:
        layer.self_attn = OwnAttention(layer.self_attn)
    decode(model)
    refuse_to_run(model, "LlamaModel", "none did", call=decode)


@pytest.mark.parametrize(
    ("family", "changes", "found"),
    [
        ("Mistral", {"sliding_window": 8}, "found 0 of 8"),
        ("Qwen3Next", {}, "found 2 of 8"),
        ("Lfm2", {}, "found 4 of 8"),
        ("Jamba", {}, "found 4 of 8"),
        ("Gemma3", {"layer_types": ["sliding_attention"] * 8 + ["full_attention"] * 4}, "4 of 12"),
        ("Llama", {"num_hidden_layers": 4}, "found 4 of 4"),
    ],
)
def test_too_few_layers_with_full_attention_are_refused(family, changes, found):
    refuse(build(family, **changes), "layers with full attention", found)


def test_naming_the_layers_does_not_make_a_sliding_model_fit():
    refuse(build("Mistral", sliding_window=8), "this model has none", select_layers=(2,))


def test_a_selection_layer_without_attention_is_refused():
    model = build("Jamba", num_hidden_layers=14)
    refuse(model, "select_layers", "layer 6", "1, 3, 5, 7, 9, 11, 13", select_layers=(6, 9))


def test_an_encoder_with_a_decoder_is_refused():
    config = T5Config(vocab_size=96, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2)
    refuse(T5ForConditionalGeneration(config), "T5ForConditionalGeneration", "encoder")


def test_an_encoder_is_refused():
    config = BertConfig(vocab_size=96, hidden_size=32, intermediate_size=32, num_attention_heads=2)
    refuse(BertModel(config), "BertModel", "bidirectional")


def test_something_that_is_no_transformers_model_is_refused():
    refuse(torch.nn.Linear(2, 2), "Linear")


def test_another_attention_implementation_is_refused():
    model = build("Llama")
    model.set_attn_implementation("eager")
    refuse(model, "'sdpa'", "'eager'")


def test_our_attention_without_enable_is_refused_when_it_runs():
    model = build("Llama")
    with tidaldecode.enable(model):
        pass  # registers the name
    model.set_attn_implementation("tidal")
    with pytest.raises(TidalError, match=r"tidaldecode\.enable"):
        decode(model)


# Settings.


def test_a_selection_layer_with_a_sliding_window_is_refused():
    refuse(build("Gemma3"), "select_layers", "layer 4", "1, 3, 5, 7, 9, 11", select_layers=(4, 7))


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        ((2, 99), "99"),
        ((2, 8), "8"),
        ((-1,), "(-1,)"),
        ((5, 2), "(5, 2)"),
        ((2, 2), "(2, 2)"),
        ((1, 4), "1"),
        ((2.0, 4), "(2.0, 4)"),
        ((True, 4), "(True, 4)"),
        ("2,4", "'2,4'"),
        (3, "3"),
        (None, "None"),
        ((4,), "layer 2"),
        (tuple(range(2, 8)), "no"),
    ],
)
def test_bad_layer_numbers_are_refused(layers, found):
    refuse(build("Llama"), found, select_layers=layers)


@pytest.mark.parametrize("budget", [0, -1, 19, 1.5, True, "8", None, math.inf])
def test_bad_budgets_are_refused(budget):
    refuse(build("Llama"), "budget", repr(budget), budget=budget)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dense_layers": -1}, "dense_layers"),
        ({"dense_layers": 6}, "found 8 of 8"),
        ({"dense_layers": 99}, "found 8 of 8"),
        ({"sink_tokens": -1}, "sink_tokens"),
        ({"recent_tokens": 2.5}, "recent_tokens"),
        ({"granularity": "head"}, "'head'"),
        ({"score": "logits"}, "query_head"),
        ({"select_layers": ()}, "budget"),
        ({"bugdet": 64}, "'bugdet'"),
    ],
)
def test_bad_and_unknown_options_are_refused(options, named):
    refuse(build("Llama"), named, **options)


# Calls.


@pytest.mark.parametrize(
    "found", [{"softcap": 50.0}, {"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(1)}]
)
@pytest.mark.parametrize("layer", [0, 5])
def test_a_layer_that_asks_for_more_than_plain_softmax_is_refused(layer, found):
    run_layer(layer, *found, f"layer {layer}", **found)


def test_a_planned_layer_that_asks_for_a_sliding_window_is_refused():
    run_layer(5, "layer 5", "sliding_window=8", sliding_window=8)


def run_layer(layer: int, *named: str, **found) -> None:
    """Call our attention function as a layer would, with what the checks of a model overlooked."""
    module = build("Llama").model.layers[layer].self_attn
    plan = LayerPlan.build(8, dense_layers=2, select_layers=(2, 4))
    query, key = torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 9, 16)
    with pytest.raises(TidalError) as caught:
        tidal_attention_forward(
            module, query, key, key, None, tidal_forward=Forward(TidalConfig(), plan), **found
        )
    for part in named:
        assert part in str(caught.value)


def test_output_attentions_is_refused_as_an_argument():
    refuse_to_run(
        build("Llama"),
        "output_attentions",
        "disable",
        call=lambda model: model(prompt(PROMPT), output_attentions=True),
    )


def test_output_attentions_is_refused_as_a_setting_of_the_model():
    model = build("Llama")
    model.config._output_attentions = True
    refuse_to_run(model, "output_attentions", call=lambda model: model(prompt(PROMPT)))


def test_output_attentions_is_refused_in_generate():
    refuse_to_run(
        build("Llama"),
        "output_attentions",
        call=lambda model: generate(model, prompt(PROMPT), output_attentions=True),
    )


def test_a_mask_with_a_hole_in_a_row_is_refused():
    ids, mask = left_padded([prompt(PROMPT), prompt(PROMPT, seed=1)])
    mask[1, 10] = 0
    refuse_to_run(
        build("Llama"), "gap", "row 1", call=lambda m: generate(m, ids, attention_mask=mask)
    )


def test_a_right_padded_prompt_is_refused_rather_than_decoded_wrongly():
    ids, mask = left_padded([prompt(PROMPT), prompt(PROMPT, seed=1)])
    mask[0, -3:] = 0
    refuse_to_run(
        build("Llama"), "gap", "row 0", call=lambda m: generate(m, ids, attention_mask=mask)
    )


def step_with_mask(mask: torch.Tensor):
    @torch.no_grad()
    def call(model):
        ids = prompt(PROMPT)
        past = model(ids[:, :-1], use_cache=True).past_key_values
        return model(ids[:, -1:], past_key_values=past, attention_mask=mask).logits

    return call


def test_a_mask_of_floats_is_refused():
    call = step_with_mask(torch.zeros(1, 1, 1, PROMPT))
    refuse_to_run(build("Llama"), "attention_mask", "float32", "[1, 1, 1, 24]", call=call)


def test_a_mask_of_booleans_per_token_is_taken():
    visible = torch.ones(1, 1, 1, PROMPT, dtype=torch.bool)
    model = build("Llama")
    with tidaldecode.enable(model, **SMALL):
        assert torch.equal(step_with_mask(visible)(model), step_with_mask(None)(model))


def test_a_refused_call_does_not_spoil_the_next_one():
    model = build("Llama")
    with tidaldecode.enable(model, **SMALL):
        expected = generate(model, prompt(PROMPT))
        with pytest.raises(TidalError):
            model(prompt(PROMPT), output_attentions=True)
        with pytest.raises(TidalError):
            step_with_mask(torch.zeros(1, 1, 1, PROMPT))(model)
        found = generate(model, prompt(PROMPT))
    assert torch.equal(logits_of(found), logits_of(expected))


def test_layers_that_share_keys_and_values_are_refused():
    model = build("Llama")
    model.config.num_kv_shared_layers = 2
    refuse(model, "LlamaForCausalLM", "2 layers that share them")


def test_heads_of_different_sizes_are_refused():
    import transformers

    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("this transformers has no Gemma 4")
    config = transformers.Gemma4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=12,
        num_attention_heads=2, num_key_value_heads=1, num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
    )  # fmt: skip
    refuse(transformers.Gemma4ForCausalLM(config).eval(), "Gemma4ForCausalLM", "one size")


def test_a_model_whose_decoder_is_no_model_is_refused():
    config = ModernBertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
        sep_token_id=2,
    )  # fmt: skip
    refuse(ModernBertForMaskedLM(config).eval(), "ModernBertForMaskedLM")
