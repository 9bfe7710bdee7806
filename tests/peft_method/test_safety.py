"""Adapter files that are damaged, foreign or wrong: one clear error each, and the model as it was before."""

import contextlib
import copy
import functools
import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from tucka.errors import CheckpointError, ConfigError, RouteError
from tucka.peft import TuckAConfig, last_route, load_adapter, pin_route, unpin_route
from tucka.peft.restoring import unchanged_on_error

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


LOADERS = {
    "tucka": load_adapter,
    "peft": PeftModel.from_pretrained,
    "peft, one more": lambda model, folder: model.load_adapter(folder, "new") and model,
}
loaders = st.sampled_from(sorted(LOADERS))


def load_or_refuse(folder, loader="tucka", errors=CheckpointError):
    """Load into a fresh model; on an error, assert that it is a clear one and nothing changed."""
    more = loader == "peft, one more"
    witness = Witness(trained() if more else base())
    try:
        model = LOADERS[loader](witness.model, folder)
    except errors as caught:
        error = caught
    else:
        return assert_loaded(model, load_file(folder / WEIGHTS), "new" if more else "default")
    witness.assert_unchanged()
    assert list(getattr(witness.model, "peft_config", {})) == ["default"] * more
    assert "expected" in str(error) or not isinstance(error, CheckpointError)
    return None


def assert_loaded(model, tensors, name="default"):
    """Assert that all of a file is in the model."""
    loaded = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], value.to(loaded[key].dtype)) for key, value in tensors.items())
    return model


@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_loads_a_good_adapter(saved, loader):
    assert load_or_refuse(saved[0], loader) is not None


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
    load_or_refuse(damaged, data.draw(loaders))


@settings(max_examples=80)
@given(data=st.data())
def test_cut_or_lengthened_files(saved, damaged, data):
    content = (saved[0] / WEIGHTS).read_bytes()
    length = data.draw(st.integers(0, len(content) - 1))
    longer = content + data.draw(st.binary(min_size=1, max_size=9))
    write(damaged, data.draw(st.sampled_from([content[:length], longer])), (saved[0] / CONFIG).read_bytes())
    assert load_or_refuse(damaged, data.draw(loaders)) is None


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
        assert load_or_refuse(damaged, data.draw(loaders)) is None


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
    assert (load_or_refuse(damaged, data.draw(loaders)) is not None) == fits


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@pytest.mark.filterwarnings("ignore:(Unexpected keyword arg|config. expected entries):UserWarning")
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
    # Which method a configuration is for, PEFT looks up itself.
    load_or_refuse(damaged, data.draw(loaders) if changed.get("peft_type") == "TUCKA" else "tucka")


@pytest.mark.filterwarnings("ignore:(Unexpected keyword arg|config. expected entries):UserWarning")
@settings(max_examples=60)
@given(data=st.data())
def test_configuration_files_with_flipped_bytes(saved, damaged, data):
    content = bytearray((saved[0] / CONFIG).read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[place] ^= data.draw(st.integers(1, 255))
    write(damaged, (saved[0] / WEIGHTS).read_bytes(), bytes(content))
    loader = data.draw(loaders)  # PEFT reads the JSON first and raises Python's errors of it
    load_or_refuse(damaged, loader, errors=CheckpointError if loader == "tucka" else Exception)


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
    "more groups than memory": ({"k": 10**13}, "shape"),
    "no number of torch's": ({"r": 10**30}, "shape"),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("loader", LOADERS)
def test_configurations_that_do_not_fit(saved, damaged, loader, name):
    changes, match = CONFIGS[name]
    if name == "another method" and loader != "tucka":
        pytest.skip("PEFT then loads with the other method")
    write(damaged, (saved[0] / WEIGHTS).read_bytes(), json.dumps({**saved[2], **changes}).encode())
    witness = Witness(trained() if "more" in loader else base())
    with pytest.raises(CheckpointError, match=match):
        LOADERS[loader](witness.model, damaged)
    witness.assert_unchanged()


@pytest.mark.parametrize(
    ("loader", "match"), [("tucka", "entries that this tucka knows, got extra"), ("peft", "extra")]
)
def test_unknown_entries_are_left_out_with_a_warning(saved, damaged, loader, match):
    write(damaged, (saved[0] / WEIGHTS).read_bytes(), json.dumps({**saved[2], "extra": 1}).encode())
    with pytest.warns(UserWarning, match=match) as caught:
        assert load_or_refuse(damaged, loader) is not None
    assert len([w for w in caught if "extra" in str(w.message)]) == 1


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


@pytest.mark.parametrize(
    "load", [functools.partial(load_adapter, adapter_name="new"), LOADERS["peft, one more"]], ids=["tucka", "peft"]
)
def test_a_merged_model_is_unmerged_whether_the_load_succeeds_or_not(saved, damaged, load):
    folder, tensors, _ = saved
    save_file(BROKEN["missing"](tensors), damaged / WEIGHTS)
    write(damaged, config=(folder / CONFIG).read_bytes())
    model = trained(pinned_gates=[[0.5, 0.5], [0.0, 0.0]])
    output = model(X)
    for path, outcome in ((damaged, pytest.raises(CheckpointError)), (folder, contextlib.nullcontext())):
        model.merge_adapter()
        with pytest.warns(UserWarning, match="Unmerging the model first"), outcome:
            load(model, path)
        assert not model.get_model_status().merged_adapters
        torch.testing.assert_close(model(X), output)


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
    "no head": lambda state: {key: value for key, value in state.items() if "head" not in key},
    "part of a head": lambda state: {key: value for key, value in state.items() if "head.bias" not in key},
}


@pytest.mark.parametrize("name", BROKEN)
def test_pefts_own_loading_refuses_before_it_writes(saved, damaged, name):
    folder, tensors, _ = saved
    model = trained()
    witness = Witness(model)
    # For a head that is not there PEFT raises itself, before it asks the method.
    with pytest.raises(KeyError if "head" in name else CheckpointError):
        set_peft_model_state_dict(model, BROKEN[name](tensors))
    witness.assert_unchanged()
    save_file(BROKEN[name](tensors), damaged / WEIGHTS)
    write(damaged, config=(folder / CONFIG).read_bytes())
    for loader in LOADERS:
        assert load_or_refuse(damaged, loader) is None


@pytest.mark.parametrize("low", [True, False])
def test_a_load_that_failed_can_be_tried_again(saved, damaged, low):
    folder, tensors, _ = saved
    save_file(BROKEN["missing"](tensors), damaged / WEIGHTS)
    write(damaged, config=(folder / CONFIG).read_bytes())
    bottom = base()
    with pytest.raises(CheckpointError):
        PeftModel.from_pretrained(bottom, damaged, low_cpu_mem_usage=low)
    model = PeftModel.from_pretrained(bottom, folder, low_cpu_mem_usage=low)
    with pytest.raises(CheckpointError):
        model.load_adapter(damaged, "new", low_cpu_mem_usage=low)
    model.load_adapter(folder, "new", low_cpu_mem_usage=low)
    for name in ("default", "new"):
        model.set_adapter(name)
        torch.testing.assert_close(model(X), trained()(X))


def test_a_configuration_from_a_file_begins_a_new_adapter_too(saved):
    """Whatever is loaded into that later, a refusal leaves what was trained."""
    folder, tensors, _ = saved
    config = TuckAConfig.from_pretrained(folder)
    config.inference_mode = False
    wider = base()
    wider.second = nn.Linear(4, 5)
    wider.head = nn.Linear(5, 2)
    model = get_peft_model(wider, config)
    model(X).sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    witness = Witness(model)
    with pytest.raises(CheckpointError):
        set_peft_model_state_dict(model, tensors)
    witness.assert_unchanged()
    assert list(model.peft_config) == ["default"]
    twin = copy.deepcopy(model)
    assert twin.peft_config["default"].loading is None
    assert "loading" not in config.to_dict()


def test_renamed_tensors_are_compared_under_their_new_names(saved, tmp_path):
    folder, tensors, _ = saved
    save_file(
        {
            key.replace("model.", "model.old.", 1).replace("base_model.old.model.", "base_model.model.old."): value
            for key, value in tensors.items()
        },
        tmp_path / WEIGHTS,
    )
    write(tmp_path, config=(folder / CONFIG).read_bytes())
    loaded = PeftModel.from_pretrained(base(), tmp_path, key_mapping={r"^old\.": ""})
    torch.testing.assert_close(loaded(X), trained()(X))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_an_adapter_that_cannot_be_added_leaves_no_trace(saved):
    """Also where PEFT finds out late: the second adapter's head is a layer that the first one adapts."""
    for model, add in (
        (trained(), lambda model, config: model.add_adapter("new", config)),
        (trained().base_model.model, lambda model, config: inject_adapter_in_model(config, model, "new")),
    ):
        witness = Witness(model)
        with pytest.raises(TypeError, match="cannot be applied"):
            add(model, TuckAConfig(r=2, target_modules=["first", "second"], modules_to_save=["first"]))
        witness.assert_unchanged()
        assert "new" not in getattr(model, "peft_config", {})


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
