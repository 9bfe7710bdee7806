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
