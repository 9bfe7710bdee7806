"""Finite numbers that the dtype of the adapter cannot hold are refused."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import save_file

from support.adapter_files import CONFIG, OPTIONS, WEIGHTS, Witness, X, base, write
from tucka.errors import CheckpointError
from tucka.peft import TuckAConfig, load_adapter


@pytest.fixture
def large(saved, tmp_path):
    """An adapter with a number beyond float16, and a head with one where asked for."""

    def made(part):
        state = {key: value.clone() for key, value in saved[1].items()}
        key = next(key for key in state if key.endswith(part))
        state[key].view(-1)[0] = 1e5
        save_file(state, tmp_path / WEIGHTS)
        write(tmp_path, config=(saved[0] / CONFIG).read_bytes())
        return tmp_path

    return made


class HalfWitness(Witness):
    """The witness of a model in half precision."""

    def call(self):
        return self.model(X.half())


@pytest.mark.parametrize("part", ["cores", "basis", "centroids", "center", "head.weight"])
@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("load", [load_adapter, PeftModel.from_pretrained], ids=["tucka", "peft"])
def test_a_finite_number_that_overflows_is_refused(large, load, low, part):
    folder = large(part)
    witness = HalfWitness(base().half())
    with pytest.raises(CheckpointError, match=rf"{part}.*float16"):
        load(witness.model, folder, autocast_adapter_dtype=False, low_cpu_mem_usage=low)
    witness.assert_unchanged()
    if part == "head.weight":  # which PEFT does not widen
        with pytest.raises(CheckpointError, match=rf"{part}.*float16"):
            load(witness.model, folder, low_cpu_mem_usage=low)
        witness.assert_unchanged()
    else:
        model = load(witness.model, folder, low_cpu_mem_usage=low)
        assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())


def test_it_is_refused_where_the_adapter_is_there_already(large):
    folder = large("cores")
    model = get_peft_model(base().half(), TuckAConfig(**OPTIONS, init_weights=False)).eval()
    witness = HalfWitness(model)
    with pytest.raises(CheckpointError, match="float16"):
        model.load_adapter(folder, "default", autocast_adapter_dtype=False)
    narrow = get_peft_model(base().half(), TuckAConfig(**OPTIONS), autocast_adapter_dtype=False).eval()
    untouched = HalfWitness(narrow)
    with pytest.raises(CheckpointError, match="float16"):  # widened, but only when the numbers have been written
        narrow.load_adapter(folder, "default")
    state = PeftModel.from_pretrained(base(), folder).state_dict()
    given = {key.replace(".default", "").replace(".modules_to_save", ""): value for key, value in state.items()}
    given = {key: value for key, value in given.items() if "base_layer" not in key and "original" not in key}
    with pytest.raises(CheckpointError, match="float16"):
        set_peft_model_state_dict(narrow, given)
    for each in (witness, untouched):
        each.assert_unchanged()
