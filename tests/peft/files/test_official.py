"""Checkpoints of the authors' code: outputs against the slow reference of their variant, and what is refused."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn

from support.bases import make_base, run
from support.close import assert_close
from tucka import reference
from tucka.errors import CheckpointError, ConfigError, RouteError
from tucka.peft import TuckAConfig, adapted_modules, balance_router, last_route, load_official_checkpoint

VARIANT = {"routing": "batch", "affinity": "group_norm", "factor_norm": "frobenius", "gate_norm": False}
WIDTHS = (6, 5, 4)


class Stack(nn.Module):
    """Two linear layers on (B, S, d), called with or without a mask."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTHS[0], WIDTHS[1]), nn.Linear(WIDTHS[1], WIDTHS[2])

    def forward(self, x, attention_mask=None):
        return self.second(torch.tanh(self.first(x)))


def adapted(*, k=3, t=2, p=2, r=2, alpha=1.5, **options):
    torch.manual_seed(0)
    config = TuckAConfig(
        r=r, k=k, t=t, p=p, alpha=alpha, **{"target_modules": ["first", "second"], **VARIANT, **options}
    )
    return get_peft_model(Stack().double(), config).eval()


def checkpoint(seed=0, *, k=3, t=2, p=2, r=2, prefix="base_model.model.", suffix=""):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, width in zip(("first", "second"), WIDTHS, strict=False):
        for part, shape in {"g": (k, p, r, r), "c": (t, p), "u": (width, r)}.items():
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            state[f"{prefix}{name}.tucka_{part}{suffix}"] = values
    router = torch.randn(k * t, WIDTHS[0], generator=generator, dtype=torch.float64)
    return {**state, f"{prefix}first.tucka_ec{suffix}": router}


def slow_forward(model, state, x, *, k, alpha, prefix="base_model.model."):
    """Their forward on NumPy numbers."""
    parts = {key: value.numpy() for key, value in state.items()}
    base = model.base_model.model
    gates = reference.official_gates(x, parts[f"{prefix}first.tucka_ec"], k)
    for name in ("first", "second"):
        cores, factor, basis = (parts[f"{prefix}{name}.tucka_{part}"] for part in "gcu")
        layer = getattr(base, name).base_layer
        x = reference.official_adapt(x, gates, cores, factor, basis, alpha=alpha)
        x = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        x = np.tanh(x) if name == "first" else x
    return x, gates


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(model, state):
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[key], value) for key, value in state.items())


@given(
    k=st.integers(1, 4),
    t=st.integers(1, 3),
    p=st.integers(1, 3),
    r=st.integers(1, 4),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    alpha=st.sampled_from([0.25, 2.0, 512.0]),
    seed=st.integers(0, 2**31),
)
@torch.no_grad()
def test_outputs_are_those_of_the_authors_code(k, t, p, r, shape, alpha, seed):
    model = adapted(k=k, t=t, p=p, r=r, alpha=alpha)
    state = checkpoint(seed, k=k, t=t, p=p, r=r)
    load_official_checkpoint(model, state)
    x = torch.randn(*shape, WIDTHS[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    desired, gates = slow_forward(model, state, x.numpy(), k=k, alpha=alpha)
    assert_close(model(x).numpy(), desired, eps=2.0**-50, terms=100, scale=alpha)
    assert_close(last_route(model).double().numpy(), gates, eps=2.0**-50)


@torch.no_grad()
def test_padding_counts_in_their_routing_feature_and_this_survives_saving(tmp_path):
    model = adapted()
    state = checkpoint()
    x = torch.randn(2, 4, WIDTHS[0], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    load_official_checkpoint(model, state)
    desired, _ = slow_forward(model, state, x.numpy(), k=3, alpha=1.5)
    assert_close(model(x, attention_mask=mask).numpy(), desired, eps=2.0**-50, terms=100)
    model.save_pretrained(tmp_path)
    again = adapted(route_tokens="all")
    again.load_adapter(tmp_path, "again")
    again.set_adapter("again")
    assert_close(again(x, attention_mask=mask).numpy(), desired, eps=2.0**-50, terms=100)


@torch.no_grad()
def test_a_bias_on_the_choice_is_set_back_since_their_code_has_none():
    model, other, state = adapted(balance_rate=9.0), adapted(), checkpoint()
    balance_router(model, torch.tensor([0, 1, 2]))
    for each in (model, other):
        load_official_checkpoint(each, state)
    x = torch.randn(2, 4, WIDTHS[0], dtype=torch.float64)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("suffix", ["", ".default", ".default.weight", ".weight"])
@pytest.mark.parametrize("prefix", ["base_model.model.", "", "module.base_model.model."])
def test_keys_are_found_whoever_saved_them(prefix, suffix):
    model, state = adapted(), checkpoint(prefix=prefix, suffix=suffix)
    load_official_checkpoint(model, state)
    experts = model.base_model.model.second.experts("default")
    assert torch.equal(experts.cores, state[f"{prefix}second.tucka_g{suffix}"])
    router = model.base_model.model.first.tucka_router["default"]
    assert torch.equal(router.centroids.flatten(0, 1), state[f"{prefix}first.tucka_ec{suffix}"])
    assert bool(router.is_initialized)  # nothing starts the trained centroids anew


def test_folders_and_files_are_read_and_pickle_only_on_request(tmp_path):
    state = checkpoint()
    save_file(state, tmp_path / "adapter_model.safetensors")
    torch.save(state, tmp_path / "adapter_model.bin")
    for source in (tmp_path, str(tmp_path), tmp_path / "adapter_model.safetensors"):
        model = adapted()
        load_official_checkpoint(model, source)
        assert torch.equal(
            model.base_model.model.first.experts("default").basis, state["base_model.model.first.tucka_u"]
        )
    model = adapted()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        load_official_checkpoint(model, tmp_path / "adapter_model.bin")
    assert same(model, before)
    load_official_checkpoint(model, tmp_path / "adapter_model.bin", allow_pickle=True)
    assert not same(model, before)


def test_a_trained_head_goes_along():
    base, _, inputs = make_base("bert")
    config = TuckAConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], **VARIANT)
    model = get_peft_model(base, config).eval()
    state = {}
    for module in adapted_modules(model):
        for part, name in {"g": "cores", "c": "expert_factor", "u": "basis"}.items():
            state[f"{module.name}.tucka_{part}"] = torch.randn(module.shapes[name])
        if module.owns_router:
            k, t, d = module.shapes["centroids"]
            state[f"{module.name}.tucka_ec"] = torch.randn(k * t, d)
    refused = snapshot(model)
    with pytest.raises(CheckpointError, match=r"classifier\.weight"):
        load_official_checkpoint(model, state)
    assert same(model, refused)
    state["base_model.model.classifier.weight"] = torch.zeros(2, 16)
    state["base_model.model.classifier.bias"] = torch.tensor([1.0, 2.0])
    load_official_checkpoint(model, state)
    torch.testing.assert_close(run(model, inputs), torch.tensor([[1.0, 2.0]]).expand(2, 2))


def without(*endings):
    return lambda state: {key: value for key, value in state.items() if not key.endswith(endings)}


def changed(ending, change):
    return lambda state: {key: change(value) if key.endswith(ending) else value for key, value in state.items()}


BROKEN = {
    "no cores": without("second.tucka_g"),
    "no router": without("tucka_ec"),
    "no layer": without("second.tucka_g", "second.tucka_c", "second.tucka_u"),
    "nothing": lambda state: {},
    "another layer": lambda state: {**state, "base_model.model.third.tucka_g": torch.ones(3, 2, 2, 2)},
    "a router elsewhere": lambda state: {
        key.replace("first.tucka_ec", "second.tucka_ec"): value for key, value in state.items()
    },
    "a foreign tensor": lambda state: {**state, "base_model.model.first.lora_A.weight": torch.ones(2, 6)},
    "two adapters": lambda state: {**state, "base_model.model.first.tucka_g.other": torch.ones(3, 2, 2, 2)},
    "transposed": changed("tucka_u", lambda value: value.t()),
    "three-dimensional centroids": changed("tucka_ec", lambda value: value.reshape(3, 2, -1)),
    "whole numbers": changed("tucka_c", lambda value: value.long()),
    "no number": changed("tucka_c", lambda value: value * float("nan")),
    "infinity": changed("second.tucka_g", lambda value: value * float("inf")),
    "a zero group": changed("first.tucka_g", lambda value: value * torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1, 1)),
    "no tensor": changed("tucka_c", lambda value: value.tolist()),
}


@pytest.mark.parametrize("name", BROKEN)
def test_wrong_or_partial_checkpoints_change_nothing(name):
    model = adapted()
    before, config = snapshot(model), copy.deepcopy(model.peft_config["default"])
    with pytest.raises(CheckpointError, match=r"expected .*, got "):
        load_official_checkpoint(model, BROKEN[name](checkpoint()))
    assert same(model, before)
    assert model.peft_config["default"] == config


@pytest.mark.parametrize("part", ["g", "c", "u", "ec"])
def test_numbers_that_overflow_in_the_adapters_dtype_change_nothing(part):
    state = {key: value.clone() for key, value in checkpoint().items()}
    state[f"base_model.model.first.tucka_{part}"].view(-1)[0] = 1e6
    load_official_checkpoint(adapted(), state)
    model = adapted().half()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=rf"tucka_{part}: expected .*float16"):
        load_official_checkpoint(model, state)
    assert same(model, before)


@settings(max_examples=60)
@given(data=st.data())
def test_damaged_files_change_nothing(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "adapter_model.safetensors"
    save_file(checkpoint(), path)
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    model = adapted()
    before = snapshot(model)
    with pytest.raises(CheckpointError):
        load_official_checkpoint(model, path)
    assert same(model, before)


@pytest.mark.parametrize(
    "options",
    [
        {"affinity": "dot"},
        {"factor_norm": None},
        {"gate_norm": True},
        {"routing": "sample"},
        {"route_tokens": "prompt"},
        {"pinned_gates": [[1.0, 0.0]] * 3},
        {"k": 2},
        {"r": 3},
        {"target_modules": ["first"]},
    ],
    ids=str,
)
def test_an_adapter_that_computes_something_else_is_refused(options):
    model = adapted(**options)
    before = snapshot(model)
    with pytest.raises(CheckpointError):
        load_official_checkpoint(model, checkpoint())
    assert same(model, before)


def test_models_and_names_without_an_adapter_are_refused(tmp_path):
    with pytest.raises(RouteError):
        load_official_checkpoint(nn.Linear(2, 2), {})
    with pytest.raises(ConfigError):
        load_official_checkpoint(adapted(), {}, adapter_name="other")
    with pytest.raises(CheckpointError, match="exists"):
        load_official_checkpoint(adapted(), tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        load_official_checkpoint(adapted(), tmp_path)
