"""The configuration: its words, its rules, its file, and one object that several models use."""

import copy
import json
import pickle

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft import PeftConfig, get_peft_model
from peft.utils import set_peft_model_state_dict
from torch import nn

from support.adapter_files import CONFIG, Witness, X, base, write
from tucka import TuckerSpec
from tucka.errors import CheckpointError, ConfigError
from tucka.peft import TuckAConfig, load_official_checkpoint, pin_route

BAD = {
    "r": 0,
    "k": -1,
    "t": 1.5,
    "p": True,
    "alpha": float("nan"),
    "temperature": 0,
    "balance_rate": -0.1,
    "routing": "layer",
    "affinity": "cosine",
    "router_init": "random",
    "gate_norm": "yes",
    "factor_norm": "l1",
    "route_tokens": "some",
    "router_seed": -1,
    "keeps_router": 2,
    "sync_routing": None,
    "init_weights": "no",
    "bias": "lora_only",
    "pinned_gates": [[1.0]],
    "tucka_format": 99,
}


@pytest.mark.parametrize("name", BAD)
def test_an_error_speaks_the_words_of_the_configuration(name):
    with pytest.raises(ConfigError) as caught:
        TuckAConfig(**{name: BAD[name]})
    assert str(caught.value).startswith(f"{name}: expected ")
    assert "(TuckAConfig)" in str(caught.value)
    assert "TuckerSpec" not in str(caught.value)


def test_a_field_that_is_set_later_is_checked_before_an_adapter_is_made():
    config = TuckAConfig(target_modules=["first"])
    config.r = 0
    witness = Witness(base())
    with pytest.raises(ConfigError, match=r"^r: expected .*\(TuckAConfig\)"):
        get_peft_model(witness.model, config)
    witness.assert_unchanged()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_modules": ["a"], "layers_pattern": "layer"}, "layers_to_transform"),
        ({"router_init": "balanced", "affinity": "dot"}, "router_init"),
    ],
)
def test_options_that_contradict_each_other(options, name):
    with pytest.raises(ConfigError, match=f"^{name}: expected"):
        TuckAConfig(**options)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("rank", "r"),
        ("groups", "k"),
        ("experts_per_group", "t"),
        ("expert_rank", "p"),
        ("lora_alpha", "alpha"),
        ("granularity", "routing"),
        ("kind", "affinity"),
        ("normalize", "gate_norm"),
        ("target_module", "target_modules"),
    ],
)
def test_a_wrong_keyword_names_the_right_one(wrong, right):
    with pytest.raises(ConfigError, match=rf"^{wrong}: expected .*TuckAConfig.* {right}$"):
        TuckAConfig(**{wrong: 2})


def test_the_defaults_are_those_of_the_specification():
    assert TuckAConfig(routing="batch").spec == TuckerSpec()


def test_numbers_of_numpy_and_torch_are_saved_as_plain_ones(tmp_path):
    whole, real = np.int64(3), np.float32(0.5)
    config = TuckAConfig(
        r=whole, k=whole, t=np.uint8(2), p=whole, alpha=real, temperature=real, balance_rate=real, router_seed=whole,
        gate_norm=np.bool_(False), sync_routing=np.bool_(True), target_modules=["a"],
        pinned_gates=torch.tensor([[0.5, 0.5], [0, 0], [0, 0]]), layers_to_transform=np.arange(2),
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    entries = json.loads((tmp_path / CONFIG).read_text())
    assert (entries["r"], entries["alpha"], entries["gate_norm"]) == (3, 0.5, False)
    assert entries["pinned_gates"] == [[0.5, 0.5], [0, 0], [0, 0]]
    assert entries["layers_to_transform"] == [0, 1]
    assert TuckAConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize("one", [np.ones(()), torch.ones(()), jnp.ones(())], ids=["NumPy", "torch", "JAX"])
def test_arrays_without_axes_are_numbers(tmp_path, one):
    whole = one.astype(np.int32) if hasattr(one, "astype") else one.int()
    config = TuckAConfig(r=whole, k=whole, alpha=2 * one, temperature=one, target_modules=["a"])
    config.save_pretrained(tmp_path)
    entries = json.loads((tmp_path / CONFIG).read_text())
    assert (entries["r"], entries["k"], entries["alpha"], entries["temperature"]) == (1, 1, 2.0, 1.0)
    with pytest.raises(ConfigError, match="alpha: expected a finite number"):
        TuckAConfig(alpha=one[None])


def test_the_configuration_survives_its_file(tmp_path):
    config = TuckAConfig(
        r=3, k=4, t=1, p=5, alpha=0.5, routing="token", target_modules=["b", "a"], exclude_modules=["c"],
        pinned_gates=[[1], [0], [0], [0]], route_tokens="prompt", sync_routing=False, router_seed=7,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is TuckAConfig
    assert loaded == config == TuckAConfig.from_pretrained(tmp_path)
    assert loaded.target_modules == {"a", "b"}
    assert loaded.peft_type is peft.PeftType.TUCKA


def test_a_file_of_a_newer_version_loses_unknown_entries_with_a_warning(tmp_path):
    TuckAConfig(r=3, target_modules=["a"]).save_pretrained(tmp_path)
    entries = json.loads((tmp_path / CONFIG).read_text())
    write(tmp_path, config=json.dumps({**entries, "novelty": 1}).encode())
    for kind in (TuckAConfig, PeftConfig):
        with pytest.warns(UserWarning, match="novelty"):
            assert kind.from_pretrained(tmp_path).r == 3


# A configuration that was read from a folder


def read(folder, **changes):
    config = TuckAConfig.from_pretrained(folder)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def test_a_configuration_from_a_folder_is_like_any_other(saved):
    config, twin = read(saved[0]), read(saved[0])
    assert config == twin == copy.deepcopy(config) == pickle.loads(pickle.dumps(config))
    names = {item.name for item in config.__dataclass_fields__.values()}
    assert vars(config).keys() == names


def test_reading_a_configuration_does_not_read_the_tensors(saved, tmp_path):
    write(tmp_path, b"damaged", (saved[0] / CONFIG).read_bytes())
    assert read(tmp_path) == read(saved[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"inference_mode": False},
        {"modules_to_save": None},
        {"modules_to_save": ["head", "scale_layer"]},
        {"modules_to_save": ["second"], "target_modules": {"first"}},
        {"r": 1, "k": 5},
    ],
)
def test_it_starts_a_new_adapter_whose_fields_may_be_changed(saved, changes):
    config = read(saved[0], init_weights=True, **changes)
    model, fresh = get_peft_model(base(), config), get_peft_model(base(), TuckAConfig(**config.to_dict()))
    shapes = [{key: value.shape for key, value in each.state_dict().items()} for each in (model, fresh)]
    assert shapes[0] == shapes[1]
    assert torch.equal(model(X), base()(X))  # a new adapter, and not the one of the folder


@pytest.mark.parametrize("wrong", ["other keys", "other sizes"])
def test_a_state_dict_that_does_not_fit_leaves_the_new_adapter(saved, wrong):
    folder, tensors, _ = saved
    base_model = base()
    if wrong == "other sizes":
        base_model.second = nn.Linear(4, 5)
        base_model.head = nn.Linear(5, 2)
        given = tensors
    else:
        given = {**tensors, "unknown": torch.ones(1)}
    model = get_peft_model(base_model, read(folder, inference_mode=False)).eval()
    witness = Witness(model)
    with pytest.raises(CheckpointError):
        set_peft_model_state_dict(model, given)
    witness.assert_unchanged()
    assert list(model.peft_config) == ["default"]
    model.train()(X).sum().backward()


def test_an_adapter_that_cannot_be_made_from_it_is_an_ordinary_error(saved):
    """Nothing is loaded, so nothing is said of files."""
    witness = Witness(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="not found") as caught:
        get_peft_model(witness.model, read(saved[0], modules_to_save=None))
    assert not isinstance(caught.value, CheckpointError)
    witness.assert_unchanged()


# One object for two models


def pair(**options):
    config = TuckAConfig(**{"r": 2, "target_modules": ["first", "second"], **options})
    return config, get_peft_model(base(), config), get_peft_model(base(), config)


def test_pinning_one_model_changes_neither_the_configuration_nor_another_model(tmp_path):
    config, pinned, other = pair()
    before = copy.deepcopy(config)
    pin_route(pinned, group=0)
    assert config == before
    assert other.peft_config["default"].pinned_gates is None
    for name, model in (("pinned", pinned), ("other", other)):
        model.save_pretrained(tmp_path / name)
    gates = {name: TuckAConfig.from_pretrained(tmp_path / name).pinned_gates for name in ("pinned", "other")}
    assert gates == {"pinned": [[0.5, 0.5], [0.0, 0.0]], "other": None}
    third = get_peft_model(base(), config)
    assert any("tucka_router" in name for name in third.state_dict())


def test_loading_a_checkpoint_of_the_authors_changes_neither(tmp_path):
    config, loaded, other = pair(routing="batch", affinity="group_norm", factor_norm="frobenius", gate_norm=False)
    state = {}
    for name in ("first", "second"):
        parts = {"g": torch.ones(2, 2, 2, 2), "c": torch.ones(2, 2), "u": torch.ones(4, 2)}
        state |= {f"{name}.tucka_{part}": value for part, value in parts.items()}
    load_official_checkpoint(loaded, {**state, "first.tucka_ec": torch.ones(4, 4)})
    assert loaded.peft_config["default"].route_tokens == "padded"
    assert (config.route_tokens, other.peft_config["default"].route_tokens) == ("all", "all")
    loaded.save_pretrained(tmp_path)
    assert TuckAConfig.from_pretrained(tmp_path).route_tokens == "padded"
