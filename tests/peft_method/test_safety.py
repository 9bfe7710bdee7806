"""Adapter files that are damaged, foreign or wrong: one clear error each, and the model as it was before."""

import copy
import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from tucka.errors import CheckpointError, ConfigError, RouteError
from tucka.peft import TuckAConfig, last_route, load_adapter, pin_route, unpin_route
from tucka.peft.loading import unchanged_on_error

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Net(nn.Module):
    """Two adapted layers and a head that is saved whole."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 2)
        self.scale = torch.ones(1)  # an attribute that is neither parameter nor buffer

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x))))) * self.scale


def base():
    torch.manual_seed(0)
    return Net()


OPTIONS = {"r": 2, "k": 2, "t": 2, "p": 1, "target_modules": ["first", "second"], "modules_to_save": ["head"]}


def trained(**options):
    model = get_peft_model(base(), TuckAConfig(**{**OPTIONS, "init_weights": False, **options}))
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.add_(1.0)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A good adapter: its folder, its tensors, its configuration's entries."""
    folder = tmp_path_factory.mktemp("good")
    trained().save_pretrained(folder)
    return folder, load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """One folder that examples write their damaged files to."""
    return tmp_path_factory.mktemp("damaged")


class Witness:
    """What a model is before a file is loaded into it, and the assertion that it still is."""

    def __init__(self, model):
        self.model = model
        self.state = {key: value.clone() for key, value in model.state_dict().items()}
        self.modules = list(model.named_modules())
        self.flags = [(parameter, parameter.requires_grad, parameter.clone()) for parameter in model.parameters()]
        self.attributes = [sorted(vars(module)) for _, module in self.modules]
        self.modes = [module.training for _, module in self.modules]
        self.output = model(X)

    def assert_unchanged(self):
        model = self.model
        assert list(model.state_dict()) == list(self.state)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in self.state.items())
        now = list(model.named_modules())
        assert [name for name, _ in now] == [name for name, _ in self.modules]
        assert all(module is known for (_, module), (_, known) in zip(now, self.modules, strict=True))
        assert [sorted(vars(module)) for _, module in now] == self.attributes
        assert [module.training for _, module in now] == self.modes
        for parameter, (known, flag, value) in zip(model.parameters(), self.flags, strict=True):
            assert parameter is known
            assert parameter.requires_grad == flag
            assert torch.equal(parameter, value)
        hooks = [
            module._forward_hooks | module._forward_pre_hooks for _, module in now if not hasattr(module, "peft_config")
        ]
        assert isinstance(model, PeftModel) or not any(hooks)
        assert torch.equal(model(X), self.output)


def write(folder, weights=None, config=None):
    for name, content in ((WEIGHTS, weights), (CONFIG, config)):
        if content is not None:
            (folder / name).write_bytes(content)


def load_or_refuse(folder):
    """Load into a fresh base model; on an error, assert that it is a clear one and nothing changed."""
    witness = Witness(base())
    try:
        model = load_adapter(witness.model, folder)
    except CheckpointError as error:
        message = str(error)
    else:
        return assert_loaded(model, load_file(folder / WEIGHTS))
    witness.assert_unchanged()
    assert "expected" in message
    return None


def assert_loaded(model, tensors):
    """Assert that all of a file is in the model."""
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], value.to(loaded[key].dtype)) for key, value in tensors.items())
    return model


def test_a_good_adapter_loads(saved):
    folder, tensors, _ = saved
    model = load_or_refuse(folder)
    torch.testing.assert_close(model(X), trained()(X))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    again = load_adapter(model, folder, adapter_name="again", is_trainable=True, low_cpu_mem_usage=True)
    assert again is model
    again.set_adapter("again")
    torch.testing.assert_close(again(X), trained()(X))
    assert set(tensors) == set(get_peft_model_state_dict(model, adapter_name="again"))
    with pytest.raises(ConfigError, match="free"):
        load_adapter(model, folder, adapter_name="again")


# Fuzzing: 620 cases in all.


@settings(max_examples=160)
@given(data=st.data())
def test_flipped_bytes(saved, damaged, data):
    content = bytearray((saved[0] / WEIGHTS).read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    # Half of them where names, shapes and offsets are.
    ends = st.integers(0, header - 1) | st.integers(0, len(content) - 1)
    for place in data.draw(st.lists(ends, min_size=1, max_size=4)):
        content[place] ^= data.draw(st.integers(1, 255))
    write(damaged, bytes(content), (saved[0] / CONFIG).read_bytes())
    load_or_refuse(damaged)


@settings(max_examples=80)
@given(data=st.data())
def test_cut_or_lengthened_files(saved, damaged, data):
    content = (saved[0] / WEIGHTS).read_bytes()
    length = data.draw(st.integers(0, len(content) - 1))
    longer = content + data.draw(st.binary(min_size=1, max_size=9))
    write(damaged, data.draw(st.sampled_from([content[:length], longer])), (saved[0] / CONFIG).read_bytes())
    assert load_or_refuse(damaged) is None


keys = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=100)
@given(data=st.data())
def test_renamed_missing_and_added_tensors(saved, damaged, data):
    _, tensors, _ = saved
    changed = dict(tensors)
    for key in data.draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=3, unique=True)):
        value = changed.pop(key)
        fate = data.draw(st.sampled_from(["drop", "rename", "swap suffix", "double"]))
        if fate == "rename":
            changed[data.draw(keys)] = value
        elif fate == "swap suffix":
            changed[key.rpartition(".")[0] + "." + data.draw(keys)] = value
        elif fate == "double":
            changed[key], changed[data.draw(keys)] = value, value.clone()
    save_file(changed, damaged / WEIGHTS)
    write(damaged, config=(saved[0] / CONFIG).read_bytes())
    if changed.keys() != tensors.keys():
        assert load_or_refuse(damaged) is None


@settings(max_examples=100)
@given(data=st.data())
def test_changed_shapes_kinds_and_numbers(saved, damaged, data):
    _, tensors, _ = saved
    key = data.draw(st.sampled_from([key for key, value in tensors.items() if value.is_floating_point()]))
    value = tensors[key]
    changes = {
        "shape": lambda: torch.ones(data.draw(st.lists(st.integers(0, 3), max_size=4)), dtype=value.dtype),
        "flat": lambda: value.flatten(),
        "more": lambda: torch.cat([value, value]),
        "whole numbers": lambda: value.long(),
        "complex": lambda: value.to(torch.complex64),
        "nan": lambda: value.clone().view(-1).index_fill_(0, torch.tensor([0]), float("nan")).reshape(value.shape),
        "infinity": lambda: torch.full_like(value, float("-inf")),
        "half": lambda: value.half(),
    }
    kind = data.draw(st.sampled_from(sorted(changes)))
    changed = changes[kind]()
    save_file({**tensors, key: changed}, damaged / WEIGHTS)
    write(damaged, config=(saved[0] / CONFIG).read_bytes())
    fits = changed.shape == value.shape and kind in ("shape", "flat", "half")
    assert (load_or_refuse(damaged) is not None) == fits


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=120)
@given(data=st.data())
def test_changed_configurations(saved, damaged, data):
    _, _, entries = saved
    changed = copy.deepcopy(entries)
    for key in data.draw(st.lists(st.sampled_from(sorted(entries)), min_size=1, max_size=2, unique=True)):
        if data.draw(st.booleans()):
            changed[key] = data.draw(json_values)
        else:
            changed[key + data.draw(st.text(max_size=2))] = changed.pop(key)
    write(damaged, (saved[0] / WEIGHTS).read_bytes(), json.dumps(changed).encode())
    load_or_refuse(damaged)


@settings(max_examples=60)
@given(data=st.data())
def test_configuration_files_with_flipped_bytes(saved, damaged, data):
    content = bytearray((saved[0] / CONFIG).read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[place] ^= data.draw(st.integers(1, 255))
    write(damaged, (saved[0] / WEIGHTS).read_bytes(), bytes(content))
    load_or_refuse(damaged)


# Single cases, and PEFT's own way of loading.

CONFIGS = {
    "format 2": ({"tucka_format": 2}, "Update tucka"),
    "no format": ({"tucka_format": None}, "tucka_format"),
    "another method": ({"peft_type": "LORA"}, "TUCKA"),
    "sizes": ({"r": 1}, "shape"),
    "no sizes": ({"r": -1}, "at least 1"),
    "targets": ({"target_modules": ["elsewhere"]}, "target_modules"),
    "fewer targets": ({"target_modules": ["first"]}, "second"),
    "no head": ({"modules_to_save": None}, "head"),
    "another head": ({"modules_to_save": ["head", "first"]}, "expected"),
    "gates": ({"pinned_gates": [[1]]}, "pinned_gates"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_do_not_fit(saved, damaged, name):
    changes, match = CONFIGS[name]
    write(damaged, (saved[0] / WEIGHTS).read_bytes(), json.dumps({**saved[2], **changes}).encode())
    witness = Witness(base())
    with pytest.raises(CheckpointError, match=match):
        load_adapter(witness.model, damaged)
    witness.assert_unchanged()


def test_foreign_folders(tmp_path):
    witness = Witness(base())
    get_peft_model(base(), LoraConfig(r=2, target_modules=["first"])).save_pretrained(tmp_path / "lora")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    write(tmp_path / "text", b"some text", b"some text")
    for name in ("lora", "empty", "text", "missing"):
        with pytest.raises(CheckpointError):
            load_adapter(witness.model, tmp_path / name)
        witness.assert_unchanged()


def test_pickle_is_read_only_on_request(saved, tmp_path):
    folder, tensors, _ = saved
    write(tmp_path, config=(folder / CONFIG).read_bytes())
    torch.save(tensors, tmp_path / "adapter_model.bin")
    witness = Witness(base())
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        load_adapter(witness.model, tmp_path)
    witness.assert_unchanged()
    model = load_adapter(witness.model, tmp_path, allow_pickle=True)
    torch.testing.assert_close(model(X), trained()(X))


class Evil:
    """Pickled code."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_pickled_code_does_not_run_even_on_request(saved, tmp_path):
    write(tmp_path, config=(saved[0] / CONFIG).read_bytes())
    torch.save({"a": Evil()}, tmp_path / "adapter_model.bin")
    witness = Witness(base())
    with pytest.raises(CheckpointError):
        load_adapter(witness.model, tmp_path, allow_pickle=True)
    witness.assert_unchanged()


def test_a_model_that_already_has_adapters_is_put_back_too(saved, damaged):
    folder, tensors, _ = saved
    broken = {key: value for key, value in tensors.items() if "second.tucka" not in key}
    save_file(broken, damaged / WEIGHTS)
    write(damaged, config=(folder / CONFIG).read_bytes())
    model = trained()
    witness = Witness(model)
    with pytest.raises(CheckpointError, match="second"):
        load_adapter(model, damaged, adapter_name="new")
    witness.assert_unchanged()
    assert list(model.peft_config) == ["default"]
    load_adapter(model, folder, adapter_name="new")
    model.set_adapter("new")
    torch.testing.assert_close(model(X), trained()(X))


BROKEN = {
    "missing": lambda state: {key: value for key, value in state.items() if "second.tucka_experts.basis" not in key},
    "unknown": lambda state: {**state, "base_model.model.third.tucka_experts.basis": torch.ones(4, 2)},
    "base weights": lambda state: {**state, "base_model.model.first.base_layer.weight": torch.zeros(4, 4)},
    "biases": lambda state: {**state, "base_model.model.first.base_layer.bias": torch.zeros(4)},
    "shape": lambda state: {
        key: value[..., :1].contiguous() if "basis" in key else value for key, value in state.items()
    },
    "nan": lambda state: {key: value * float("nan") if "cores" in key else value for key, value in state.items()},
    "whole numbers": lambda state: {key: value.long() if "cores" in key else value for key, value in state.items()},
}


@pytest.mark.parametrize("name", BROKEN)
def test_pefts_own_loading_refuses_before_it_writes(saved, damaged, name):
    folder, tensors, _ = saved
    model = trained()
    witness = Witness(model)
    with pytest.raises(CheckpointError):
        set_peft_model_state_dict(model, BROKEN[name](tensors))
    witness.assert_unchanged()
    save_file(BROKEN[name](tensors), damaged / WEIGHTS)
    write(damaged, config=(folder / CONFIG).read_bytes())
    with pytest.raises(CheckpointError):
        PeftModel.from_pretrained(base(), damaged)


@pytest.mark.parametrize("fault", ["cut", "nan", "format", "numbers", "cut pickle"])
def test_pefts_own_loading_finds_damaged_files_before_it_changes_the_model(saved, tmp_path, fault):
    folder, tensors, entries = saved
    content = (folder / WEIGHTS).read_bytes()
    if fault == "cut":
        content = content[:-1]
    elif fault == "nan":
        save_file(
            {key: value * float("nan") if value.ndim else value for key, value in tensors.items()}, tmp_path / "x"
        )
        content = (tmp_path / "x").read_bytes()
    changes = {"format": {"tucka_format": 2}, "numbers": {"alpha": "1"}}.get(fault, {})
    write(tmp_path, content, json.dumps({**entries, **changes}).encode())
    if fault == "cut pickle":
        torch.save(tensors, tmp_path / "adapter_model.bin")
        (tmp_path / WEIGHTS).unlink()
        (tmp_path / "adapter_model.bin").write_bytes((tmp_path / "adapter_model.bin").read_bytes()[:-99])
    witness = Witness(base())
    with pytest.raises(CheckpointError):
        PeftModel.from_pretrained(witness.model, tmp_path)
    witness.assert_unchanged()
    model = trained()
    witness = Witness(model)
    with pytest.raises(CheckpointError):
        model.load_adapter(tmp_path, "new")
    witness.assert_unchanged()


@pytest.mark.parametrize("loader", [load_adapter, PeftModel.from_pretrained], ids=["tucka", "peft"])
def test_trained_biases_are_loaded(tmp_path, loader):
    model = trained(bias="all")
    with torch.no_grad():
        model.base_model.model.first.base_layer.bias.add_(1.0)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(loader(base(), tmp_path)(X), model(X))


@pytest.mark.parametrize("loader", [load_adapter, PeftModel.from_pretrained], ids=["tucka", "peft"])
def test_a_route_pinned_later_is_saved_with_its_router_and_can_be_unpinned(tmp_path, loader):
    model = trained()
    routed = model(X)
    gates = pin_route(model, gates=[[0.3, 0.9], [0.1, 0.0]])
    model.save_pretrained(tmp_path)
    loaded = loader(base(), tmp_path)
    torch.testing.assert_close(loaded(X), model(X))
    assert torch.equal(last_route(loaded), gates)
    assert not loaded.base_model.model.first.tucka_router["default"].centroids.requires_grad
    unpin_route(loaded)
    torch.testing.assert_close(loaded(X), routed)
    loaded.set_adapter("default")
    assert loaded.base_model.model.first.tucka_router["default"].centroids.requires_grad


@pytest.mark.parametrize("loader", [load_adapter, PeftModel.from_pretrained], ids=["tucka", "peft"])
def test_a_pinned_configuration_accepts_a_file_that_still_has_a_router(saved, tmp_path, loader):
    folder, _, entries = saved
    gates = [[0.3, 0.9], [0.1, 0.0]]
    write(tmp_path, (folder / WEIGHTS).read_bytes(), json.dumps({**entries, "pinned_gates": gates}).encode())
    loaded = loader(base(), tmp_path)
    model = trained()
    pin_route(model, gates=gates)
    torch.testing.assert_close(loaded(X), model(X))
    with pytest.raises(RouteError):
        unpin_route(loaded)


def change_and_stop(model):
    with unchanged_on_error(model):
        model.eval()
        model.extra = 1
        del model.scale
        model.second = nn.Identity()
        model.first.register_forward_hook(lambda *_: None)
        model.first.weight.requires_grad_(False)
        raise KeyboardInterrupt


def test_the_guard_puts_everything_back():
    model = base()
    handle = model.first.register_forward_hook(lambda *_: None)
    expected = dict(vars(model))
    with pytest.raises(KeyboardInterrupt):
        change_and_stop(model)
    assert vars(model).keys() == expected.keys()
    assert model.training
    assert model.first.weight.requires_grad
    assert isinstance(model.second, nn.Linear)
    assert len(model.first._forward_hooks) == 1
    handle.remove()  # still refers to the layer's own table
    assert not model.first._forward_hooks
