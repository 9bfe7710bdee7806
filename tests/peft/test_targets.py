"""Which layers are adapted and what is saved with them; unsuitable ones leave the model as it was."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from support.adapting import adapt, config_for, train
from support.tiny_models import inputs_for, make
from tucka.peft import TuckAConfig, adapted_modules


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["query"]}, {"0.attention.self.query", "1.attention.self.query"}),
        (
            {"target_modules": ["query", "value"], "exclude_modules": ["value"]},
            {"0.attention.self.query", "1.attention.self.query"},
        ),
        ({"target_modules": ["query"], "layers_to_transform": [1]}, {"1.attention.self.query"}),
        (
            {"target_modules": ["query"], "layers_to_transform": 0, "layers_pattern": "layer"},
            {"0.attention.self.query"},
        ),
        ({"target_modules": r".*layer\.1.*(query|key)"}, {"1.attention.self.query", "1.attention.self.key"}),
    ],
)
def test_targets_are_chosen_as_peft_chooses_them(options, expected):
    model = get_peft_model(make("bert"), TuckAConfig(r=4, **options))
    prefix = "base_model.model.bert.encoder.layer."
    assert {row.name for row in adapted_modules(model)} == {prefix + name for name in expected}


def test_all_linear_finds_plain_and_adapted_layers_but_no_head():
    model = adapt("bert", target_modules="all-linear")
    first = {row.name for row in adapted_modules(model)}
    assert len(first) == 13
    assert not any("classifier" in name for name in first)
    model.add_adapter("other", config_for("bert", target_modules="all-linear"))
    assert {row.name for row in adapted_modules(model) if row.adapter == "other"} == first


def test_modules_to_save_are_trained_and_saved_whole(tmp_path):
    model = adapt("bert", modules_to_save=["classifier"])
    train(model, inputs_for("bert"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make("bert", seed=0), tmp_path)
    head = model.base_model.model.classifier.modules_to_save["default"].weight
    assert torch.equal(loaded.base_model.model.classifier.modules_to_save["default"].weight, head)
    assert not torch.equal(head, make("bert").classifier.weight)


@pytest.mark.parametrize("bias", ["all", "tucka_only"])
def test_biases_are_trained_where_asked_for(bias):
    model = get_peft_model(make("bert"), TuckAConfig(r=4, bias=bias, target_modules=["query"]))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and "tucka_" not in name}
    everywhere = {name for name, _ in model.named_parameters() if name.endswith("bias") and "tucka_" not in name}
    assert trainable == (everywhere if bias == "all" else {name for name in everywhere if "query" in name})


class Attention(nn.Module):
    """A model with layers that cannot be adapted beside ones that can."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.grouped = nn.Conv1d(8, 8, 1, groups=2)
        self.conv = nn.Conv1d(8, 8, 1)
        self.norm = nn.LayerNorm(8)
        self.narrow = nn.Linear(3, 8)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["linear", "attention"]}, "MultiheadAttention"),
        ({"target_modules": ["linear", "out_proj"]}, "target_modules: expected .*out_proj.*exclude_modules"),
        ({"target_modules": ["linear", "grouped"]}, "groups=2"),
        ({"target_modules": ["linear", "norm"]}, "LayerNorm"),
        ({"target_modules": ["linear", "narrow"]}, "r: expected .*3.*4.*smaller r"),
        ({"target_modules": ["linear", "conv"], "routing": "token"}, "routing: expected .*sample"),
        ({"target_modules": ["linear"], "router_module": "conv"}, "router_module: expected"),
        ({"target_modules": ["nothing"]}, "not found"),
        ({"target_modules": ["linear"], "exclude_modules": ["linear"]}, "exclude_modules"),
    ],
)
def test_unsuitable_targets_raise_and_leave_the_model_untouched(options, message):
    model = Attention()
    kinds_before = [type(module) for module in model.modules()]
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, TuckAConfig(r=4, samples_first=True, **options))
    assert [type(module) for module in model.modules()] == kinds_before
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


class InParts(nn.Module):
    """An attention of timm that keeps the bias of its projection in parts."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(24))
        self.qkv_bias_separate = False

    def forward(self, x):
        if self.qkv_bias_separate:
            return self.qkv(x) + self.q_bias
        return nn.functional.linear(x, self.qkv.weight, self.q_bias)


def test_a_projection_of_which_the_parent_may_read_the_weight():
    model = nn.Sequential(InParts())
    config = TuckAConfig(r=4, target_modules=["qkv"], samples_first=True)
    with pytest.raises(ValueError, match=r"target_modules: expected .*InParts.* qkv_bias_separate = True"):
        get_peft_model(model, config)
    model[0].qkv_bias_separate = True
    adapted = get_peft_model(model, config)
    assert adapted(torch.ones(2, 3, 8)).requires_grad


class FluxTransformer2DModel(nn.Module):
    """What a model of this name registers first does not run first."""

    def __init__(self):
        super().__init__()
        self.context_embedder, self.x_embedder = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, hidden_states, encoder_hidden_states):
        return self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)


@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
def test_the_router_stands_where_a_known_model_runs_first(routing):
    config = TuckAConfig(r=4, target_modules=["context_embedder", "x_embedder"], routing=routing)
    adapted = get_peft_model(FluxTransformer2DModel(), config)
    image, text = adapted(torch.ones(2, 5, 8), torch.ones(2, 3, 6))
    assert image.shape == (2, 5, 8)
    assert text.shape == (2, 3, 8)
