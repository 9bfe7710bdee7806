"""Several adapters on one model: their sizes, sums, merging, deletion and unloading."""

import pytest
import torch
from peft import get_model_status, get_peft_model, inject_adapter_in_model
from torch import nn

from support.adapting import adapt, config_for, snapshot
from support.tiny_models import inputs_for, make, output_of
from tucka.backends.torch.routing.scope import scope_of
from tucka.peft import TuckAConfig, TuckALayer, expert_load, initialize_router, last_route, pin_route


def two_adapters():
    """A model whose adapters differ in everything, the second one's router on a layer that the first one has too."""
    torch.manual_seed(0)
    first = TuckAConfig(r=4, k=3, routing="batch", target_modules=["query", "dense"], init_weights=False)
    model = get_peft_model(make("bert"), first).eval()
    other = TuckAConfig(
        r=2, k=2, t=3, p=1, alpha=0.5, routing="sample", target_modules=["query", "value"], init_weights=False
    )
    model.add_adapter("other", other)
    return model, inputs_for("bert")


@torch.no_grad()
def test_each_adapter_has_its_own_sizes_routing_and_router():
    model, inputs = two_adapters()
    scope = scope_of(model)
    assert scope.router("default") is not scope.router("other")
    first = output_of(model, inputs)
    assert last_route(model).shape == (3, 2)
    model.set_adapter("other")
    second = output_of(model, inputs)
    assert last_route(model).shape == (3, 2, 3)
    assert expert_load(model).tolist() != [0, 0]
    assert not torch.allclose(first, second, atol=1e-3)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if ".other." in name}
    model.set_adapter("default")
    assert torch.equal(output_of(model, inputs), first)


@torch.no_grad()
def test_updates_of_active_adapters_add_each_on_the_original_input(monkeypatch):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5)).double()
    config = {"target_modules": ["0"], "init_weights": False, "r": 2}
    model = get_peft_model(base, TuckAConfig(**config))
    model.add_adapter("other", TuckAConfig(**{**config, "r": 3, "alpha": -0.5}))
    x = torch.randn(4, 6, dtype=torch.float64)
    plain, parts = base[0].base_layer(x), []
    for name in ("default", "other"):
        model.set_adapter(name)
        parts.append(model(x) - plain)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(x), plain + parts[0] + parts[1], rtol=0, atol=1e-12)


@torch.no_grad()
def test_merging_one_after_another_is_merging_at_once_and_unmerging_restores():
    model, inputs = two_adapters()
    model.double()
    for name in ("default", "other"):
        pin_route(model, group=0, adapter_name=name)
    model.base_model.set_adapter(["default", "other"])
    both, weights = output_of(model, inputs), snapshot(model)
    model.merge_adapter()
    torch.testing.assert_close(output_of(model, inputs), both, rtol=0, atol=1e-10)
    at_once = snapshot(model)
    model.unmerge_adapter()
    for name, value in snapshot(model).items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-12)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(["other"])
    for name, value in snapshot(model).items():
        torch.testing.assert_close(value, at_once[name], rtol=0, atol=1e-12)


def holds_name(thing, name, seen=None):
    """Whether a dictionary reached from an object's attributes has the name as a key."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, (torch.Tensor, str, type)):
        return False
    seen.add(id(thing))
    if isinstance(thing, dict) and name in thing:
        return True
    if isinstance(thing, (list, tuple, set)):
        inner = list(thing)
    elif isinstance(thing, dict):
        inner = list(thing.values())
    else:
        inner = list(vars(thing).values()) if hasattr(thing, "__dict__") else []
    return any(holds_name(part, name, seen) for part in inner)


def test_a_deleted_adapter_leaves_no_trace():
    model, inputs = two_adapters()
    model.set_adapter("other")
    out = output_of(model, inputs)
    pin_route(model, group=0)
    assert holds_name(model, "other")
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("other")
    assert not holds_name(model, "other")
    assert model.active_adapters == ["default"]
    output_of(model, inputs).sum().backward()
    assert out is not None


@pytest.mark.parametrize("deleted", ["default", "other"])
@torch.no_grad()
def test_an_adapter_survives_another_one_deleted_from_the_layer_of_its_router(deleted):
    model, inputs = two_adapters()
    kept = "other" if deleted == "default" else "default"
    model.set_adapter(kept)
    before = output_of(model, inputs)
    model.delete_adapter(deleted)
    assert torch.equal(output_of(model, inputs), before)


@torch.no_grad()
def test_the_last_adapter_takes_the_hooks_with_it_and_a_new_one_brings_them_back():
    inputs = inputs_for("llama")
    model = adapt("llama", init_weights=False)
    root, before = model.base_model.model, output_of(make("llama"), inputs)
    model.delete_adapter("default")
    assert not root._forward_pre_hooks
    assert not root._forward_hooks
    assert "generate" not in vars(root)
    assert torch.equal(output_of(root, inputs), before)
    model.add_adapter("new", config_for("llama", init_weights=False))
    model.set_adapter("new")
    assert not torch.equal(output_of(model, inputs), before)


@torch.no_grad()
def test_an_adapter_made_anew_starts_anew():
    inputs = inputs_for("plain")
    model = inject_adapter_in_model(config_for("plain", init_weights=False), make("plain"))
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        inject_adapter_in_model(config_for("plain", k=2, routing="sample"), model)
    assert torch.equal(output_of(model, inputs), output_of(make("plain"), inputs))
    assert last_route(model).shape == (3, 2, 2)


def test_unloading_leaves_the_base_as_it_was():
    base = make("llama")
    attributes, hooks = set(vars(base)), (dict(base._forward_pre_hooks), dict(base._forward_hooks))
    model = get_peft_model(base, config_for("llama"))
    output_of(model, inputs_for("llama"))
    restored = model.unload()
    assert restored is base
    assert set(vars(base)) == attributes
    assert (dict(base._forward_pre_hooks), dict(base._forward_hooks)) == hooks
    assert not any(isinstance(module, TuckALayer) for module in base.modules())
    assert torch.equal(output_of(base, inputs_for("llama")), output_of(make("llama"), inputs_for("llama")))


def test_peft_reports_the_model_and_its_layers():
    model, _ = two_adapters()
    status = model.get_model_status()
    assert status.adapter_model_type == "TuckAModel"
    assert status.peft_types == {"default": "TUCKA", "other": "TUCKA"}
    assert (status.enabled, status.active_adapters, status.available_adapters) == (
        True,
        ["default"],
        ["default", "other"],
    )
    assert get_model_status(model.base_model.model).active_adapters == ["default"]
    layers = model.get_layer_status()
    assert {layer.module_type for layer in layers} == {"tucka.TuckALinear"}
    assert layers[0].requires_grad == {"default": True, "other": False}


@pytest.mark.parametrize("options", [{}, {"balance_rate": 0.1}, {"affinity": "dot"}])
def test_a_copy_of_the_parameters_of_an_adapter_is_the_adapter(options):
    """TRL's reference adapters: one more adapter by the same configuration, and then its parameters alone."""
    model = adapt("llama", routing="sample", k=3, init_weights=False, **options).eval()
    initialize_router(model, [inputs_for("llama", batch=8)], progress=False)
    router = scope_of(model).router("default")
    if router.choice_bias is not None:
        router.choice_bias.copy_(torch.tensor([0.5, -0.5, 0.0]))
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    inputs = inputs_for("llama", batch=8, seed=2)
    expected = output_of(model, inputs)
    model.set_adapter("ref")
    assert torch.equal(output_of(model, inputs), expected)
    # Trained on, it goes on from the copy, and no data starts it again.
    before = scope_of(model).router("ref").centroids.detach().clone()
    output_of(model.train(), inputs)
    assert torch.equal(scope_of(model).router("ref").centroids, before)


def test_one_more_adapter_by_the_same_configuration_still_starts_from_data():
    model = adapt("llama", routing="sample")
    initialize_router(model, [inputs_for("llama", batch=8)], progress=False)
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    assert scope_of(model).router("other").waits
    initialize_router(model, [inputs_for("llama", batch=8, seed=3)], progress=False)
    assert not scope_of(model).router("other").waits
    centers = [scope_of(model).router(name).center for name in ("default", "other")]
    assert not torch.allclose(*centers)
