"""A batch with several adapters: each row is as if its adapter were called on it alone."""

import threading

import pytest
import torch
from peft import get_peft_model

from support.adapting import config_for
from support.tiny_models import inputs_for, make, output_of
from tucka.errors import ConfigError
from tucka.peft import expert_load, pin_route

NAMES = ["default", "__base__", "other", "default"]


def two(kind, **options):
    torch.manual_seed(0)
    given = {"routing": "sample", "init_weights": False, **options}
    model = get_peft_model(make(kind), config_for(kind, **given))
    model.add_adapter("other", config_for(kind, **{**given, "r": 3, "alpha": 2.0}))
    return model.eval()


def alone(model, name, call):
    """Call with one adapter, or none."""
    if name == "__base__":
        with model.disable_adapter():
            return call()
    model.set_adapter(name)
    return call()


@pytest.mark.each_value
@pytest.mark.parametrize("kind", ["llama", "bert", "vit", "gpt2"])
@pytest.mark.parametrize("routing", ["sample", "token", "pinned"])
@torch.no_grad()
def test_rows_are_those_of_their_adapters(kind, routing):
    pinned = {"pinned_gates": [[0.5, 0.5], [0.0, 0.0], [0.0, 0.0]]} if routing == "pinned" else {"routing": routing}
    model = two(kind, **pinned)
    inputs = inputs_for(kind, batch=4)
    load = expert_load(model)
    mixed = output_of(model, {**inputs, "adapter_names": NAMES})
    assert torch.equal(expert_load(model), load)
    for row, name in enumerate(NAMES):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        torch.testing.assert_close(
            mixed[row : row + 1], alone(model, name, lambda one=one: output_of(model, one)), rtol=1e-4, atol=1e-5
        )
    model.set_adapter("default")
    again = output_of(model, inputs)
    assert not torch.allclose(again, mixed, atol=1e-3)


@pytest.mark.parametrize("more", [{}, {"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
@torch.no_grad()
def test_generation_repeats_the_names_for_its_beams(more):
    model, inputs = two("llama"), inputs_for("llama", batch=4)
    options = {"max_new_tokens": 4, "do_sample": False, **more}
    mixed = model.generate(**inputs, adapter_names=NAMES, **options)
    copies = more.get("num_return_sequences", 1)
    for row, name in enumerate(NAMES):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        expected = alone(model, name, lambda one=one: model.generate(**one, **options))
        assert torch.equal(mixed[row * copies : (row + 1) * copies], expected)


@torch.no_grad()
def test_an_encoder_is_called_on_rows_that_are_not_repeated():
    model, inputs = two("t5"), inputs_for("t5", batch=4)
    given = {key: value for key, value in inputs.items() if not key.startswith("decoder") and key != "labels"}
    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    mixed = model.generate(**given, adapter_names=NAMES, **options)
    for row, name in enumerate(NAMES):
        one = {key: value[row : row + 1] for key, value in given.items()}
        assert torch.equal(mixed[row], alone(model, name, lambda one=one: model.generate(**one, **options))[0])


@torch.no_grad()
def test_heads_that_are_saved_whole_follow_the_rows():
    model = two("bert", modules_to_save=["classifier"])
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["other"].bias.add_(5.0)
    inputs = inputs_for("bert", batch=4)
    mixed = output_of(model, {**inputs, "adapter_names": NAMES})
    model.set_adapter("other")
    torch.testing.assert_close(mixed[2:3], output_of(model, {key: value[2:3] for key, value in inputs.items()}))


@torch.no_grad()
def test_another_thread_is_not_told():
    model, inputs = two("llama"), inputs_for("llama", batch=4)
    expected, found = output_of(model, inputs), []
    layer = next(module for module in model.modules() if hasattr(module, "tucka_experts"))
    asked = []

    @torch.set_grad_enabled(torch.is_grad_enabled())  # a thread has its own mode, in which few rows round differently
    def ask():
        found.append(output_of(model, inputs))

    def meanwhile(*_):
        if not asked:
            asked.append(True)
            thread = threading.Thread(target=ask)
            thread.start()
            thread.join()

    handle = layer.register_forward_hook(meanwhile)
    output_of(model, {**inputs, "adapter_names": NAMES})
    handle.remove()
    assert torch.equal(found[0], expected)


WRONG = {
    "an unknown name": (["default", "none", "other", "other"], "names of adapters"),
    "another number": (["default"], "a name for each of the 4 rows"),
    "text": ("default", "a list"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_names_are_refused(what):
    names, rule = WRONG[what]
    with pytest.raises(ConfigError, match=f"adapter_names: expected .*{rule}"):
        output_of(two("llama"), {**inputs_for("llama", batch=4), "adapter_names": names})


def test_training_merged_models_and_batch_routing_are_refused():
    inputs = {**inputs_for("llama", batch=4), "adapter_names": NAMES}
    with pytest.raises(ConfigError, match="adapter_names: expected None in training"):
        output_of(two("llama").train(), inputs)
    with pytest.raises(ConfigError, match="adapter_names: expected adapters that are not routed by batch"):
        output_of(two("llama", routing="batch"), inputs)
    model = two("llama")
    pin_route(model, group=0, adapter_name="default")
    model.merge_adapter()
    with pytest.raises(ConfigError, match="adapter_names: expected None while adapters are merged"):
        output_of(model, inputs)
