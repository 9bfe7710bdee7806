"""Loading an adapter by tucka and by PEFT: what fits is all there."""

import contextlib
import functools
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import BertForQuestionAnswering, BertForTokenClassification

from support.adapter_files import (
    CONFIG,
    LOADERS,
    WEIGHTS,
    Witness,
    X,
    base,
    faulty,
    load_or_refuse,
    trained,
    write,
)
from support.tiny_models import bert_config, inputs_for
from tucka.backends.torch.routing.scope import scope_of
from tucka.errors import CheckpointError, ConfigError, RouteError
from tucka.peft import TuckAConfig, last_route, load_adapter, pin_route, unpin_route


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


@pytest.mark.parametrize(
    "load", [functools.partial(load_adapter, adapter_name="new"), LOADERS["peft, one more"]], ids=["tucka", "peft"]
)
def test_a_merged_model_is_unmerged_whether_the_load_succeeds_or_not(saved, damaged, load):
    folder, tensors, _ = saved
    save_file(faulty(tensors, "a factor is missing"), damaged / WEIGHTS)
    write(damaged, config=(folder / CONFIG).read_bytes())
    model = trained(pinned_gates=[[0.5, 0.5], [0.0, 0.0]])
    output = model(X)
    for path, outcome in ((damaged, pytest.raises(CheckpointError)), (folder, contextlib.nullcontext())):
        model.merge_adapter()
        with pytest.warns(UserWarning, match="Unmerging the model first"), outcome:
            load(model, path)
        assert not model.get_model_status().merged_adapters
        torch.testing.assert_close(model(X), output)


@pytest.mark.parametrize("low", [True, False])
def test_a_load_that_failed_can_be_tried_again(saved, damaged, low):
    folder, tensors, _ = saved
    save_file(faulty(tensors, "a factor is missing"), damaged / WEIGHTS)
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


@pytest.mark.parametrize("loader", [load_adapter, PeftModel.from_pretrained], ids=["tucka", "peft"])
def test_a_router_that_earlier_versions_marked_with_a_boolean_is_read(saved, tmp_path, loader):
    folder, tensors, _ = saved
    flags = {key: torch.tensor(True) for key in tensors if key.endswith("is_initialized")}
    save_file({**tensors, **flags}, tmp_path / WEIGHTS)
    write(tmp_path, config=(folder / CONFIG).read_bytes())
    assert len(flags) == 1
    assert not scope_of(loader(base(), tmp_path)).router("default").waits


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


def test_a_subfolder_is_looked_into(saved, tmp_path):
    (tmp_path / "inner").mkdir()
    for name in (WEIGHTS, CONFIG):
        (tmp_path / "inner" / name).write_bytes((saved[0] / name).read_bytes())
    model = PeftModel.from_pretrained(base(), tmp_path, subfolder="inner")
    model.load_adapter(tmp_path, "new", subfolder="inner")
    assert torch.equal(model(X), trained()(X))
    save_file(faulty(saved[1], "the head is missing"), tmp_path / "inner" / WEIGHTS)
    for load, known in (
        (lambda model: PeftModel.from_pretrained(model, tmp_path, subfolder="inner"), base()),
        (lambda model: model.load_adapter(tmp_path, "other", subfolder="inner"), model),
    ):
        witness = Witness(known)
        with pytest.raises(CheckpointError, match="head"):
            load(known)
        witness.assert_unchanged()


def test_a_repository_of_the_hub_is_checked_too(saved, tmp_path, monkeypatch):
    """From its cache, as an offline machine does."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--adapter"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for name in (WEIGHTS, CONFIG):
        (snapshot / name).write_bytes((saved[0] / name).read_bytes())
    model = PeftModel.from_pretrained(base(), "someone/adapter", cache_dir=tmp_path)
    assert torch.equal(model(X), trained()(X))
    save_file(faulty(saved[1], "the head is missing"), snapshot / WEIGHTS)
    witness = Witness(base())
    with pytest.raises(CheckpointError, match="head"):
        PeftModel.from_pretrained(witness.model, "someone/adapter", cache_dir=tmp_path)
    witness.assert_unchanged()


@pytest.mark.parametrize(
    ("kind", "task"), [(BertForTokenClassification, "TOKEN_CLS"), (BertForQuestionAnswering, "QUESTION_ANS")]
)
def test_heads_that_peft_wraps_late(tmp_path, kind, task):
    """Its classes for these tasks wrap the head after the adapter is in the model."""

    def made():
        torch.manual_seed(0)
        return kind(bert_config()).eval()

    options = {"r": 2, "target_modules": ["query"], "init_weights": False, "task_type": task}
    model = get_peft_model(made(), TuckAConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1.0)
    inputs = {key: inputs_for("bert")[key] for key in ("input_ids", "attention_mask")}
    wanted = model(**inputs)[0]
    model.save_pretrained(tmp_path)
    for config in (None, TuckAConfig(**options)):
        assert torch.equal(PeftModel.from_pretrained(made(), tmp_path, config=config)(**inputs)[0], wanted)
