"""Options that users of PEFT know from its other methods, and what wrong ones raise."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from support.adapting import adapt, config_for, trained
from support.tiny_models import inputs_for, loss_of, make, output_of
from tucka.errors import ConfigError
from tucka.peft import TuckAConfig, export_lora, load_adapter, pin_route
from tucka.peft.adapters import layers_of

PATTERNS = {"rank_pattern": {"query": 3, r"layer\.1\..*value": 2}, "alpha_pattern": {"value": 0.25}}


def test_patterns_choose_a_layers_rank_and_scale():
    model = adapt("bert", target_modules=["query", "value"], **PATTERNS)
    found = {path.partition("layer.")[2]: layer.experts("default") for path, layer in layers_of(model)}
    sizes = {name: (parts.basis.shape[1], parts.alpha) for name, parts in found.items()}
    assert sizes == {
        "0.attention.self.query": (3, 1.0), "0.attention.self.value": (4, 0.25),
        "1.attention.self.query": (3, 1.0), "1.attention.self.value": (2, 0.25),
    }  # fmt: skip


@pytest.mark.parametrize("load", [load_adapter, PeftModel.from_pretrained], ids=["tucka", "peft"])
def test_an_adapter_with_patterns_is_saved_loaded_merged_and_exported(tmp_path, load):
    model, inputs = trained("bert", target_modules=["query", "value"], **PATTERNS)
    model.save_pretrained(tmp_path)
    expected = output_of(model, inputs)
    assert torch.equal(output_of(load(make("bert"), tmp_path).eval(), inputs), expected)
    pin_route(model, group=1)
    pinned = output_of(model, inputs)
    export_lora(model, tmp_path / "lora")
    model.merge_adapter()
    torch.testing.assert_close(output_of(model, inputs), pinned, rtol=1e-4, atol=1e-5)
    exported = PeftModel.from_pretrained(make("bert"), tmp_path / "lora").eval()
    torch.testing.assert_close(output_of(exported, inputs), pinned, rtol=1e-4, atol=1e-5)


def test_a_rank_above_a_layers_width_is_refused_for_that_layer():
    with pytest.raises(ConfigError, match=r"r: expected at most the width 16, got 17 .*query"):
        adapt("bert", target_modules=["query"], rank_pattern={"query": 17})


def test_dropout_is_for_training_and_for_the_updates_inputs_alone():
    model = adapt("llama", routing="sample", init_weights=False, dropout=0.5)
    inputs = inputs_for("llama")
    with torch.no_grad():
        expected = output_of(adapt("llama", routing="sample", init_weights=False), inputs)
        assert torch.equal(output_of(model, inputs), expected)
        model.train()
        torch.manual_seed(0)
        first, second = output_of(model, inputs), output_of(model, inputs)
    assert not torch.allclose(first, second, atol=1e-3)
    start = adapt("llama", routing="sample", dropout=0.5).train()
    with torch.no_grad():
        assert torch.equal(output_of(start, inputs), output_of(make("llama").train(), inputs))
    loss_of(start, inputs).backward()
    assert all(torch.isfinite(value.grad).all() for value in start.parameters() if value.requires_grad)


@pytest.mark.parametrize("tokens", [[3, 4], {"embed_tokens": [3, 4]}], ids=["list", "dict"])
def test_rows_of_the_embeddings_are_trained_and_saved(tmp_path, tokens):
    model, inputs = trained("llama", routing="sample", trainable_token_indices=tokens)
    delta = next(value for name, value in model.named_parameters() if "trainable_tokens_delta.default" in name)
    embeddings = make("llama").get_input_embeddings().weight
    assert delta.shape == (2, 16)
    assert not torch.allclose(delta, embeddings[[3, 4]])
    model.save_pretrained(tmp_path)
    assert torch.equal(output_of(load_adapter(make("llama"), tmp_path).eval(), inputs), output_of(model, inputs))


WRONG = {
    "dropout": [1.0, -0.1, "much"],
    "rank_pattern": [{"query": 0}, {3: 4}, ["query"]],
    "alpha_pattern": [{"query": float("nan")}, 2.0],
    "trainable_token_indices": [3, "all", [-1], {"embed_tokens": 3}],
    "target_modules": [3, [3]],
    "exclude_modules": [3],
    "modules_to_save": ["head", 3],
    "router_module": [["query"], 3],
    "layers_to_transform": ["first", -1, [0, "1"]],
    "layers_pattern": [3],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_option_is_named(name, value):
    with pytest.raises(ConfigError, match=rf"^{name}.*: expected"):
        TuckAConfig(**{"target_modules": ["query"], name: value})


def test_the_first_token_of_a_vocabulary_may_train():
    assert TuckAConfig(target_modules=["query"], trainable_token_indices=(0,)).trainable_token_indices == [0]


def test_a_pinned_route_may_be_of_many_experts():
    """More than the whole numbers that Python has only once."""
    gates = [[1 / 300] * 300]
    assert TuckAConfig(target_modules=["query"], k=1, t=300, pinned_gates=gates).pinned_gates == gates


@pytest.mark.parametrize(("word", "right"), [("lora_dropout", "dropout"), ("lora_alpha", "alpha")])
def test_the_words_of_lora_are_told_the_words_here(word, right):
    with pytest.raises(TypeError, match=f"{word}: expected .* The word here is {right}"):
        TuckAConfig(**{word: 0.1})


def test_a_configuration_with_nothing_to_decide_is_kept_and_one_that_leaves_something_is_not_changed():
    decided = config_for("llama", routing="sample", factor_norm="rotation")
    open_one = config_for("llama", routing=None)
    assert get_peft_model(make("llama"), decided).peft_config["default"] is decided
    usual = config_for("llama", routing="sample")
    assert get_peft_model(make("llama"), usual).peft_config["default"] is usual
    assert usual.factor_norm == "rotation"
    model = get_peft_model(make("llama"), open_one)
    config = model.peft_config["default"]
    assert (config.routing, open_one.routing) == ("token", None)
    assert (config.factor_norm, open_one.factor_norm) == ("rotation", "auto")
    assert get_peft_model(make("llama"), config_for("llama", routing="given")).peft_config["default"].factor_norm == (
        "columns"
    )
    everywhere = TuckAConfig(r=2, routing="sample", target_modules="all-linear")
    get_peft_model(make("llama"), everywhere)
    assert everywhere.target_modules == "all-linear"


# Scales that are set later, as diffusers does


def scaled(model):
    return [layer for _, layer in layers_of(model)]


@torch.no_grad()
def test_scales_weaken_an_adapter_and_come_back():
    model, inputs = adapt("bert", routing="sample", init_weights=False), inputs_for("bert")
    full, halved = output_of(model, inputs), adapt("bert", routing="sample", init_weights=False, alpha=0.5)
    for layer in scaled(model):
        layer.scale_layer(0.5)
    assert torch.equal(output_of(model, inputs), output_of(halved, inputs))
    for layer in scaled(model):
        layer.unscale_layer(0.5)
    assert torch.equal(output_of(model, inputs), full)
    for layer in scaled(model):
        layer.set_scale("default", 0.0)
        layer.set_scale("another", 3.0)
    torch.testing.assert_close(output_of(model, inputs), output_of(make("bert"), inputs))
    for layer in scaled(model):
        layer.unscale_layer()
    assert torch.equal(output_of(model, inputs), full)
    with pytest.raises(ConfigError, match="scale: expected a finite number"):
        scaled(model)[0].set_scale("default", None)
    with pytest.raises(ConfigError, match="scale: expected None or a factor"):
        scaled(model)[0].unscale_layer(0)


@torch.no_grad()
def test_a_scale_is_merged_and_setting_one_unmerges_first():
    model, inputs = adapt("bert", init_weights=False, dtype=torch.float64), inputs_for("bert", dtype=torch.float64)
    pin_route(model, group=1)
    for layer in scaled(model):
        layer.set_scale("default", 0.5)
    weak = output_of(model, inputs)
    model.merge_adapter()
    torch.testing.assert_close(output_of(model, inputs), weak)
    for layer in scaled(model):
        with pytest.warns(UserWarning, match="Unmerging it first"):
            layer.set_scale("default", 1.0)
    assert not torch.allclose(output_of(model, inputs), weak, atol=1e-3)


def test_layers_tell_their_widths():
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 3), nn.Conv2d(2, 5, 1)), TuckAConfig(r=2, target_modules=["0", "1"])
    )
    assert [(layer.in_features, layer.out_features) for layer in scaled(model)] == [(4, 3), (2, 5)]
    assert {layer.out_features for layer in scaled(adapt("gpt2"))} >= {48}
