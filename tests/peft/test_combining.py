"""The weighted sum of pinned adapters is one adapter, exactly."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from tucka.errors import ConfigError, RouteError
from tucka.peft import TuckAConfig, adapted_modules, unpin_route
from tucka.peft.adapters import layers_of

X = torch.linspace(-1, 1, 40, dtype=torch.float64).reshape(5, 8)
PINNED = {"init_weights": False, "pinned_gates": [[0.7, 0.3], [0.0, 0.2]]}
WEIGHTS = {"default": 0.5, "other": -1.0, "authors": 2.0}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def several():
    """Adapters of other ranks, sizes, scales and layers; on the last layer more directions than it is wide."""
    options = {"autocast_adapter_dtype": False}
    model = get_peft_model(net(), TuckAConfig(r=4, alpha=0.5, target_modules=["0", "2"], **PINNED), **options)
    model.add_adapter("other", TuckAConfig(r=3, k=2, t=2, p=3, target_modules=["2", "4"], **PINNED))
    factor = {"factor_norm": "frobenius", "affinity": "dot"}
    model.add_adapter("authors", TuckAConfig(r=6, target_modules=["4"], **factor, **PINNED))
    return model.double().eval()


def test_the_sum_is_that_of_the_updates_and_is_saved_and_merged(tmp_path):
    model = several()
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum")
    model.double().set_adapter("sum")
    found = model(X)
    for _, layer in layers_of(model):
        for name, weight in WEIGHTS.items():
            layer.set_scale(name, weight)
    model.base_model.set_adapter(list(WEIGHTS))
    torch.testing.assert_close(found, model(X), rtol=0, atol=1e-12)
    ranks = {row.name: row.shapes["basis"] for row in adapted_modules(model) if row.adapter == "sum"}
    assert [shape[1] for shape in ranks.values()] == [4, 7, 6]
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(net(), tmp_path / "sum", autocast_adapter_dtype=False)
    torch.testing.assert_close(loaded(X), found, rtol=0, atol=1e-12)
    model.merge_adapter()
    torch.testing.assert_close(model(X), found, rtol=0, atol=1e-12)


def test_one_adapter_with_a_weight_is_the_adapter_with_that_scale():
    model = several()
    model.add_weighted_adapter(["default"], [2.0], "twice", combination_type="svd")
    model.double().set_adapter("twice")
    found = model(X)
    model.set_adapter("default")
    for _, layer in layers_of(model, "default"):
        layer.set_scale("default", 2.0)
    torch.testing.assert_close(model(X), found, rtol=0, atol=1e-12)


WRONG = {
    "adapters": ((["default", "none"], [1.0, 1.0], "sum"), "different names"),
    "adapters twice": ((["default", "default"], [1.0, 1.0], "sum"), "different names"),
    "weights": ((["default"], [1.0, 2.0], "sum"), "1 numbers"),
    "weights of text": ((["default"], ["1"], "sum"), "a finite number"),
    "adapter_name": ((["default"], [1.0], "other"), "a name that is free"),
    "combination_type": ((["default"], [1.0], "sum", "ties"), "the exact sum"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named(what):
    arguments, rule = WRONG[what]
    model = several()
    before = list(model.peft_config)
    with pytest.raises(ConfigError, match=rf"^{what.split()[0]}: expected .*{rule}"):
        model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == before


def test_routed_adapters_and_saved_heads_are_refused():
    model = get_peft_model(net(), TuckAConfig(r=2, target_modules=["0"], keeps_router=True, **PINNED))
    unpin_route(model)
    with pytest.raises(RouteError, match="adapters: expected pinned adapters"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    model = get_peft_model(net(), TuckAConfig(r=2, target_modules=["0"], modules_to_save=["4"], **PINNED))
    with pytest.raises(ConfigError, match="adapters: expected adapters without modules_to_save"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
