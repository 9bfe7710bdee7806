"""Saving and loading adapters, with PEFT, with transformers' own methods and with the Auto classes."""

import json

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
    get_peft_model,
    set_peft_model_state_dict,
)
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from support.adapting import adapt, config_for, snapshot, train, trained
from support.tiny_models import KINDS, inputs_for, make, output_of
from support.upstream import transformers_takes_peft
from tucka.backends.torch.routing.scope import scope_of
from tucka.peft import TuckAConfig, initialize_router, last_route, pin_route

second_tuner = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")


def assert_close(found, wanted):
    """Equal but for the last bits: weights mapped from a file lie at other addresses, where BLAS sums otherwise."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def initialised(kind, **options):
    """A trained model whose router was started from data."""
    model = adapt(kind, **options)
    inputs = inputs_for(kind)
    initialize_router(model, [inputs], progress=False)
    return train(model, inputs), inputs


@pytest.mark.each_value
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("safe", [True, False])
@torch.no_grad()
def test_a_saved_adapter_gives_the_same_outputs(kind, safe, tmp_path, recwarn):
    with torch.enable_grad():
        model, inputs = initialised(kind)
    before = output_of(model, inputs)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    assert (tmp_path / ("adapter_model.safetensors" if safe else "adapter_model.bin")).exists()
    loaded = PeftModel.from_pretrained(make(kind), tmp_path).eval()
    assert torch.equal(output_of(loaded, inputs), before)
    router, original = scope_of(loaded).router("default"), scope_of(model).router("default")
    assert bool(router.is_initialized)
    assert torch.equal(router.center, original.center)
    assert not [str(w.message) for w in recwarn if "missing" in str(w.message).lower()]
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.each_value
@pytest.mark.parametrize("kind", ["llama", "bert", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_loading_with_low_memory_is_loading(kind, dtype, tmp_path):
    with torch.enable_grad():
        model, inputs = trained(kind, dtype=dtype, steps=2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(kind, dtype=dtype), tmp_path, low_cpu_mem_usage=True).eval()
    assert not any(p.is_meta for p in loaded.parameters())
    assert torch.equal(output_of(loaded, inputs), output_of(model, inputs))
    assert {p.dtype for name, p in loaded.named_parameters() if "tucka_" in name} == {torch.float32}
    loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    loaded.set_adapter("other")
    assert torch.equal(output_of(loaded, inputs), output_of(model, inputs))
    options = {"low_cpu_mem_usage": True, "autocast_adapter_dtype": False}
    narrow = PeftModel.from_pretrained(make(kind, dtype=dtype), tmp_path, **options)
    assert {p.dtype for name, p in narrow.named_parameters() if "tucka_" in name} == {dtype}


NAMES = ["b", "bb", "default_b", "my_tucka_router"]


@torch.no_grad()
def test_adapters_whose_names_contain_each_other_are_saved_apart(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(make("bert"), TuckAConfig(r=2, target_modules=["query"], init_weights=False), "b")
    for number, name in enumerate(NAMES[1:]):
        options = {"r": 3 + number, "k": 2 + number, "routing": ["batch", "sample", "token"][number % 3]}
        model.add_adapter(name, TuckAConfig(target_modules=["query", "value"], init_weights=False, **options))
    inputs, outputs = inputs_for("bert"), {}
    for name in NAMES:
        model.set_adapter(name)
        outputs[name] = output_of(model.eval(), inputs)
    model.base_model.set_adapter(["b", "bb"])
    both = output_of(model, inputs)
    model.save_pretrained(tmp_path, selected_adapters=NAMES[:3])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(NAMES[:3])
    sizes = {name: len(load_file(tmp_path / name / "adapter_model.safetensors")) for name in NAMES[:3]}
    assert sizes == {"b": 2 * 4 + 3, "bb": 4 * 4 + 3, "default_b": 4 * 4 + 3}
    loaded = PeftModel.from_pretrained(make("bert"), tmp_path / "bb", adapter_name="bb")
    for name in ("b", "default_b"):
        loaded.load_adapter(tmp_path / name, name)
    for name in NAMES[:3]:
        loaded.set_adapter(name)
        assert torch.equal(output_of(loaded.eval(), inputs), outputs[name])
    loaded.base_model.set_adapter(["b", "bb"])
    torch.testing.assert_close(output_of(loaded, inputs), both, rtol=0, atol=1e-6)


def test_the_files_keys_do_not_tell_the_adapters_name(tmp_path):
    model = get_peft_model(make("bert"), TuckAConfig(r=2, target_modules=["query"]), "some_name")
    keys = set(get_peft_model_state_dict(model, adapter_name="some_name"))
    layer = "base_model.model.bert.encoder.layer.{}.attention.self.query.tucka_experts.{}"
    parts = {
        layer.format(number, part) for number in (0, 1) for part in ("cores", "expert_factor", "basis", "strength")
    }
    router = "base_model.model.bert.encoder.layer.0.attention.self.query.tucka_router."
    assert keys == parts | {router + name for name in ("centroids", "center", "is_initialized")}
    other = get_peft_model(make("bert"), TuckAConfig(r=2, target_modules=["query"]), "other")
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model, adapter_name="some_name"), "other")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "tucka" in key]


@torch.no_grad()
def test_loading_into_an_adapter_that_exists_replaces_its_values(tmp_path):
    with torch.enable_grad():
        model, inputs = initialised("bert")
    model.save_pretrained(tmp_path)
    before = output_of(model, inputs)
    with torch.enable_grad():
        train(model, inputs)
    assert not torch.equal(output_of(model, inputs), before)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(output_of(model.eval(), inputs), before)


@torch.no_grad()
def test_a_pinned_route_is_saved_with_the_adapter(tmp_path):
    with torch.enable_grad():
        model, inputs = initialised("llama")
    gates = pin_route(model, batches=[inputs])
    before = output_of(model, inputs)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["pinned_gates"] == gates.tolist()
    loaded = PeftModel.from_pretrained(make("llama"), tmp_path).eval()
    assert torch.equal(last_route(loaded), gates)
    assert torch.equal(output_of(loaded, inputs), before)


# Transformers' own methods


@torch.no_grad()
def native_round_trip(tmp_path, **options):
    model = make("llama")
    model.add_adapter(config_for("llama", init_weights=False, **options))
    with torch.enable_grad():
        inputs = inputs_for("llama")
        initialize_router(model, [inputs], progress=False)
        train(model, inputs)
    return model, inputs, output_of(model, inputs)


@transformers_takes_peft
@second_tuner
@torch.no_grad()
def test_transformers_adds_sets_disables_and_deletes(tmp_path):
    model, inputs, first = native_round_trip(tmp_path)
    base = output_of(make("llama"), inputs)
    assert not torch.equal(first, base)
    model.add_adapter(config_for("llama", k=2, routing="sample", init_weights=False), adapter_name="other")
    second = output_of(model.eval(), inputs)
    assert not torch.equal(second, first)
    model.set_adapter("default")
    assert torch.equal(output_of(model, inputs), first)
    assert model.active_adapters() == ["default"]
    model.disable_adapters()
    assert torch.equal(output_of(model, inputs), base)
    model.enable_adapters()
    assert torch.equal(output_of(model, inputs), first)
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    assert torch.equal(output_of(model, inputs), second)
    model.delete_adapter("other")
    assert torch.equal(output_of(model, inputs), base)
    assert "generate" not in vars(model)
    assert not model._forward_pre_hooks


@transformers_takes_peft
@torch.no_grad()
def test_transformers_saves_and_loads_adapters(tmp_path):
    base_folder, folder = tmp_path / "base", tmp_path / "adapter"
    make("llama").save_pretrained(base_folder)
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    model.add_adapter(config_for("llama", init_weights=False))
    inputs = inputs_for("llama")
    initialize_router(model, [inputs], progress=False)
    with torch.enable_grad():
        train(model, inputs)
    before = output_of(model.eval(), inputs)
    model.save_pretrained(folder)
    assert not (folder / "model.safetensors").exists()
    again = AutoModelForCausalLM.from_pretrained(base_folder)
    again.load_adapter(folder)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    auto = AutoPeftModelForCausalLM.from_pretrained(folder)
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder)
    for loaded in (again, whole, auto, wrapped):
        assert_close(output_of(loaded.eval(), inputs), before)
        router = scope_of(loaded).router("default")
        assert bool(router.is_initialized)
        assert torch.equal(router.center, scope_of(model).router("default").center)


@torch.no_grad()
def test_what_peft_saved_transformers_loads(tmp_path):
    make("llama").save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config_for("llama"))
    inputs = inputs_for("llama")
    with torch.enable_grad():
        train(model, inputs)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert_close(output_of(loaded, inputs), output_of(model, inputs))
    assert snapshot(loaded).keys() == {name.removeprefix("base_model.model.") for name in snapshot(model)}


AUTO = {
    "bert": AutoPeftModelForSequenceClassification,
    "vit": AutoPeftModel,
    "gpt2": AutoPeftModelForCausalLM,
    "opt": AutoPeftModelForCausalLM,
    "t5": AutoPeftModelForSeq2SeqLM,
}


@transformers_takes_peft
@pytest.mark.parametrize("kind", AUTO)
@torch.no_grad()
def test_auto_classes_and_transformers_find_the_base_of_each_kind(kind, tmp_path):
    make(kind).save_pretrained(tmp_path / "base")
    cls = type(make(kind))
    model = get_peft_model(cls.from_pretrained(tmp_path / "base"), config_for(kind, init_weights=False)).eval()
    model.save_pretrained(tmp_path / "wrapped")
    loaded = AUTO[kind].from_pretrained(tmp_path / "wrapped").eval()
    assert_close(output_of(loaded, inputs_for(kind)), output_of(model, inputs_for(kind)))
    bare = cls.from_pretrained(tmp_path / "base").eval()
    bare.add_adapter(config_for(kind, init_weights=False))
    bare.save_pretrained(tmp_path / "bare")
    again = cls.from_pretrained(tmp_path / "bare").eval()
    assert_close(output_of(again, inputs_for(kind)), output_of(bare, inputs_for(kind)))
    assert all(torch.equal(value, snapshot(bare)[name]) for name, value in snapshot(again).items())
