"""Files that do not fit are one CheckpointError, whichever way they are loaded, and the model is as it was."""

import json
import resource

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from support.adapter_files import CONFIG, FAULTS, LOADERS, WEIGHTS, Witness, base, faulty, trained, write
from tucka.errors import CheckpointError
from tucka.peft import TuckAConfig


def with_config(model, folder):
    """PEFT's way to give a configuration that was read, and perhaps changed, before."""
    return PeftModel.from_pretrained(model, folder, config=TuckAConfig.from_pretrained(folder))


WAYS = {**LOADERS, "peft, with a configuration": with_config}
ways = pytest.mark.parametrize("way", WAYS)


def model_for(way):
    return trained() if "more" in way else base()


def assert_refused(way, folder, match, model=None):
    witness = Witness(model_for(way) if model is None else model)
    adapters = list(getattr(witness.model, "peft_config", {}))
    with pytest.raises(CheckpointError, match=match):
        WAYS[way](witness.model, folder)
    witness.assert_unchanged()
    assert list(getattr(witness.model, "peft_config", {})) == adapters


@ways
@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_do_not_fit(saved, damaged, way, fault):
    save_file(faulty(saved[1], fault), damaged / WEIGHTS)
    write(damaged, config=(saved[0] / CONFIG).read_bytes())
    assert_refused(way, damaged, FAULTS[fault][1])


# Biases that another configuration of the adapter has trained are read from a state dict, as PEFT does.
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "biases of the base"])
def test_a_state_dict_that_does_not_fit(saved, fault):
    witness = Witness(trained())
    # For a head that is not there PEFT raises itself, before it asks the method.
    with pytest.raises(KeyError if "head" in fault else CheckpointError, match=FAULTS[fault][1]):
        set_peft_model_state_dict(witness.model, faulty(saved[1], fault))
    witness.assert_unchanged()


class Narrower(nn.Module):
    """A model whose second layer has another width."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.scale = torch.ones(1)

    def forward(self, x):
        return self.head(self.second(self.first(x)))


@pytest.mark.parametrize("way", [way for way in WAYS if "more" not in way])
def test_a_model_that_does_not_fit(saved, way):
    assert_refused(way, saved[0], r"second.*shape", Narrower())
    assert_refused(way, saved[0], "not found|target", nn.Sequential(nn.Linear(4, 2)))


def test_an_adapted_model_that_does_not_fit(saved):
    model = get_peft_model(Narrower(), TuckAConfig(r=2, k=2, t=2, p=1, target_modules=["first"])).eval()
    assert_refused("peft, one more", saved[0], r"second.*shape", model)


@ways
def test_a_folder_without_weights(saved, tmp_path, way):
    write(tmp_path, config=(saved[0] / CONFIG).read_bytes())
    assert_refused(way, tmp_path, "adapter_model.safetensors")


@ways
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_a_task_that_the_model_cannot_do(saved, tmp_path, way, task):
    """PEFT itself finds it out when the adapter is in the model."""
    write(tmp_path, (saved[0] / WEIGHTS).read_bytes(), json.dumps({**saved[2], "task_type": task}).encode())
    if "more" in way:  # the class of the model that is there decides
        assert WAYS[way](trained(), tmp_path).peft_config["new"].task_type == task
    else:
        assert_refused(way, tmp_path, "task_type: expected")


def test_foreign_folders(tmp_path):
    get_peft_model(base(), LoraConfig(r=2, target_modules=["first"])).save_pretrained(tmp_path / "lora")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    write(tmp_path / "text", b"some text", b"some text")
    for name in ("lora", "empty", "text", "missing"):
        assert_refused("tucka", tmp_path / name, "config: expected")


@ways
@pytest.mark.parametrize("fault", ["cut", "format", "numbers", "cut pickle"])
def test_damaged_files(saved, tmp_path, way, fault):
    folder, tensors, entries = saved
    content = (folder / WEIGHTS).read_bytes()
    changes = {"format": {"tucka_format": 2}, "numbers": {"alpha": "1"}}.get(fault, {})
    write(tmp_path, content[:-1] if fault == "cut" else content, json.dumps({**entries, **changes}).encode())
    if fault == "cut pickle":
        torch.save(tensors, tmp_path / "adapter_model.bin")
        (tmp_path / WEIGHTS).unlink()
        (tmp_path / "adapter_model.bin").write_bytes((tmp_path / "adapter_model.bin").read_bytes()[:-99])
    assert_refused(way, tmp_path, "expected")


# Memory: a configuration of 834 bytes can ask for any number of bytes.


def tiny_router(key, value):
    """Factors as the configuration wants them, each small; their router has 10¹⁰ centroids."""
    shapes = {"cores": (10**5, 1, 1, 1), "expert_factor": (10**5, 1), "basis": (len(value) if value.ndim else 1, 1)}
    return torch.ones(shapes.get(key.rpartition(".")[2], value.shape)).to(value.dtype)


GREEDY = {
    "no tensors of the adapter": ({"k": 50_000, "r": 4, "p": 2048}, lambda key, value: None),
    "tiny tensors": ({"k": 50_000, "r": 4, "p": 2048}, lambda key, value: value),
    "a tiny router": ({"k": 10**5, "t": 10**5, "r": 1, "p": 1}, tiny_router),
}


@ways
@pytest.mark.parametrize("files", GREEDY)
def test_a_configuration_that_asks_for_gigabytes_gets_none(saved, damaged, way, files):
    sizes, change = GREEDY[files]
    tensors = {key: change(key, value) for key, value in saved[1].items() if "tucka" in key}
    head = {key: value for key, value in saved[1].items() if "head" in key}
    save_file({**head, **{key: value for key, value in tensors.items() if value is not None}}, damaged / WEIGHTS)
    write(damaged, config=json.dumps({**saved[2], **sizes}).encode())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_refused(way, damaged, r"first\.tucka_(experts|router).*(shape|none)|none for first")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes
