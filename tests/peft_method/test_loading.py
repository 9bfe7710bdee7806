"""Loading by tucka and by PEFT: what does not fit is refused before the model changes, what fits is all there."""

import contextlib
import copy
import functools
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from tests.support.adapter_files import CONFIG, LOADERS, WEIGHTS, Witness, X, base, load_or_refuse, trained, write
from tucka.errors import CheckpointError, RouteError
from tucka.peft import TuckAConfig, last_route, load_adapter, pin_route, unpin_route
from tucka.peft.files.rollback import unchanged_on_error


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
