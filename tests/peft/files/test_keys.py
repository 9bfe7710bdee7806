"""Names of adapters: PEFT takes them out of keys as text, so a name that would lose tensors is refused."""

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict

from support.adapter_files import Witness
from support.adapting import config_for
from support.tiny_models import inputs_for, make, output_of
from tucka.errors import ConfigError
from tucka.peft import TuckAConfig, load_adapter

HEAD = {"modules_to_save": ["classifier"]}
# A name, the adapter that is there already, the options of both.
CLASHES = {
    "a part of its factors' names": ("basis", "default", {}),
    "another part": ("cores", "default", {}),
    "the third": ("expert_factor", "default", {}),
    "of the router": ("centroids", "default", {}),
    "of a layer's path": ("attention", "default", {}),
    "the layer itself": ("query", "default", {}),
    "a number in the path": ("0", "default", {}),
    "of what PEFT puts before all paths": ("model", "default", {}),
    "of a head that is saved whole": ("weight", "default", HEAD),
    "of its own head alone": ("weight", None, HEAD),
    "of its own biases alone": ("key", None, {"bias": "all"}),
    "the first one's name is a part of the second's": ("other", "value", {}),
}


def adapted(name, options, model=None):
    torch.manual_seed(0)
    config = config_for("bert", target_modules=["query"], init_weights=False, **options)
    return get_peft_model(make("bert") if model is None else model, config, adapter_name=name).eval()


def saves_all(model, name):
    """Whether PEFT saves, under keys that it reads again, as many tensors as the adapter has."""
    twin = adapted("twin", {})
    wanted = [key for key in get_peft_model_state_dict(twin, adapter_name="twin") if "tucka_" in key]
    return {key for key in get_peft_model_state_dict(model, adapter_name=name) if "tucka_" in key} == set(wanted)


@pytest.mark.parametrize("clash", CLASHES)
def test_a_name_with_which_tensors_would_be_lost_is_refused(clash):
    name, first, options = CLASHES[clash]
    if first is None:
        witness = ModelWitness(make("bert"))
        with pytest.raises(ConfigError, match=rf"^adapter_name: expected .*'{name}'.* part of"):
            adapted(name, options, model=witness.model)
    else:
        model = adapted(first, options)
        witness = ModelWitness(model)
        targets = ["query", "value"] if first == "value" else ["query"]
        config = config_for("bert", target_modules=targets, **{**options, "bias": "none"})
        with pytest.raises(ConfigError, match=rf"^adapter_name: expected .*'{name}'.* part of"):
            model.add_adapter(name, config)
        assert list(model.peft_config) == [first]
    witness.assert_unchanged()


class ModelWitness(Witness):
    """The witness of a transformers model, which is called with its own inputs."""

    def call(self):
        return output_of(self.model, inputs_for("bert"))


@pytest.mark.parametrize("name", ["basis", "cores", "attention", "query", "default_query", "tucka_router", "expert"])
@torch.no_grad()
def test_what_is_accepted_survives_its_file(name, tmp_path):
    """A name that clashes with nothing in this very model is good, however unlucky it looks."""
    model = adapted(name, {})
    assert saves_all(model, name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make("bert"), tmp_path / name, adapter_name=name).eval()
    assert torch.equal(output_of(loaded, inputs_for("bert")), output_of(model, inputs_for("bert")))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_all_ways_to_add_an_adapter_refuse_the_name(tmp_path):
    adapted("default", {}).save_pretrained(tmp_path)
    model = adapted("default", {})
    ways = [
        lambda: model.add_adapter("query", config_for("bert")),
        lambda: model.load_adapter(tmp_path, "query"),
        lambda: load_adapter(model, tmp_path, adapter_name="query"),
        lambda: inject_adapter_in_model(config_for("bert"), model.base_model.model, "query"),
    ]
    for add in ways:
        witness = ModelWitness(model)
        with pytest.raises(ConfigError, match="adapter_name: expected"):
            add()
        witness.assert_unchanged()
        assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["a.b", "keys", "training", "forward", "/abs/path"])
def test_a_name_that_no_container_or_folder_can_have_is_refused(name):
    with pytest.raises(ConfigError, match="adapter_name: expected"):
        get_peft_model(make("plain"), config_for("plain"), adapter_name=name)


def test_adapters_of_two_towers_may_be_called_after_them():
    model = get_peft_model(make("t5"), TuckAConfig(r=2, target_modules=r"encoder.*\.q"), adapter_name="encoder")
    model.add_adapter("decoder", TuckAConfig(r=2, target_modules=r"decoder.*\.q"))
    for name in ("encoder", "decoder"):
        keys = get_peft_model_state_dict(model, adapter_name=name)
        assert len(keys) == 2 * 4 * (1 if name == "encoder" else 2) + 3
