"""What PEFT's users rely on: start, training, dtypes, several adapters, deleting, copies, reports."""

import copy
import io
import pickle

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from support.adapting import adapt, config_for, snapshot, train, trained
from support.tiny_models import KINDS, inputs_for, loss_of, make, output_of
from tucka.backends.torch.scope import scope_of
from tucka.errors import ConfigError, RouteError
from tucka.peft import TuckAConfig, TuckALayer, adapted_modules, expert_load, last_route, pin_route, unpin_route

kinds = pytest.mark.parametrize("kind", KINDS)
routings = pytest.mark.parametrize("routing", ["batch", "sample", "token"])


@kinds
@routings
@torch.no_grad()
def test_an_untrained_adapter_changes_no_bit_and_a_random_one_shows(kind, routing):
    inputs = inputs_for(kind)
    before = output_of(make(kind), inputs)
    assert torch.equal(output_of(adapt(kind, routing=routing), inputs), before)
    random = adapt(kind, routing=routing, init_weights=False)
    assert not torch.allclose(output_of(random, inputs), before, atol=1e-3)
    with random.disable_adapter():
        assert torch.equal(output_of(random, inputs), before)


@kinds
@routings
def test_three_steps_change_all_that_is_trained_and_nothing_else(kind, routing):
    model = adapt(kind, routing=routing)
    before = snapshot(model)
    with torch.no_grad():
        base_output = output_of(make(kind), inputs_for(kind))
    train(model, inputs_for(kind))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("tucka_" in name or "modules_to_save" in name for name in trainable)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == trainable
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(output_of(model, inputs_for(kind)), base_output)


@pytest.mark.filterwarnings("ignore:t. expected at least 2:UserWarning")
def test_with_one_expert_the_router_gets_a_gradient_of_zeros():
    model = adapt("bert", t=1)
    before = snapshot(model)
    train(model, inputs_for("bert"))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable - changed == {name for name in trainable if name.endswith("centroids")}
    loss_of(model.train(), inputs_for("bert")).backward()
    router = scope_of(model).router("default")
    assert torch.equal(router.centroids.grad, torch.zeros_like(router.centroids))


def test_one_expert_with_normalised_gates_warns_once_for_each_adapter(recwarn):
    model = adapt("bert", t=1)
    loss_of(model, inputs_for("bert"))
    assert [str(w.message)[:2] for w in recwarn if w.category is UserWarning] == ["t:"]
    recwarn.clear()
    adapt("bert", t=1, gate_norm=False)
    adapt("bert", t=1, pinned_gates=[[1.0], [0.0], [0.0]])
    assert not [w for w in recwarn if w.category is UserWarning]


# Dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("widened", [True, False])
@pytest.mark.parametrize("kind", ["llama", "plain", "vit"])
def test_adapters_are_float32_or_the_bases_dtype_and_outputs_the_bases(kind, dtype, widened):
    inputs = inputs_for(kind, dtype=dtype)
    base = make(kind, dtype=dtype)
    with torch.no_grad():
        before = output_of(base, inputs)
    model = get_peft_model(base, config_for(kind), autocast_adapter_dtype=widened).eval()
    held = {p.dtype for name, p in model.state_dict().items() if "tucka_" in name and p.is_floating_point()}
    assert held == {torch.float32 if widened else dtype}
    with torch.no_grad():
        after = output_of(model, inputs)
    assert after.dtype == dtype
    assert torch.equal(after, before)
    for _ in range(2):  # plain steps: Adam's epsilon is zero in half precision
        loss_of(model, inputs).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not torch.equal(output_of(model, inputs), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_trains_a_float32_model(dtype):
    model = adapt("bert").train()
    with torch.autocast("cpu", dtype=dtype):
        loss_of(model, inputs_for("bert")).backward()
    assert last_route(model).dtype == torch.float32
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# Several adapters


def two_adapters():
    """A model whose adapters differ in everything, the second one's router on a layer that the first one has too."""
    torch.manual_seed(0)
    first = TuckAConfig(r=4, k=3, target_modules=["query", "dense"], init_weights=False)
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


# Which layers


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["query"]}, {"0.attention.self.query", "1.attention.self.query"}),
        (
            {"target_modules": ["query", "value"], "exclude_modules": ["value"]},
            {"0.attention.self.query", "1.attention.self.query"},
        ),
        ({"target_modules": ["query"], "layers_to_transform": [1]}, {"1.attention.self.query"}),
        (
            {"target_modules": ["query"], "layers_to_transform": 0, "layers_pattern": "layer"},
            {"0.attention.self.query"},
        ),
        ({"target_modules": r".*layer\.1.*(query|key)"}, {"1.attention.self.query", "1.attention.self.key"}),
    ],
)
def test_targets_are_chosen_as_peft_chooses_them(options, expected):
    model = get_peft_model(make("bert"), TuckAConfig(r=4, **options))
    prefix = "base_model.model.bert.encoder.layer."
    assert {row.name for row in adapted_modules(model)} == {prefix + name for name in expected}


def test_all_linear_finds_plain_and_adapted_layers_but_no_head():
    model = adapt("bert", target_modules="all-linear")
    first = {row.name for row in adapted_modules(model)}
    assert len(first) == 13
    assert not any("classifier" in name for name in first)
    model.add_adapter("other", config_for("bert", target_modules="all-linear"))
    assert {row.name for row in adapted_modules(model) if row.adapter == "other"} == first


def test_modules_to_save_are_trained_and_saved_whole(tmp_path):
    model = adapt("bert", modules_to_save=["classifier"])
    train(model, inputs_for("bert"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make("bert", seed=0), tmp_path)
    head = model.base_model.model.classifier.modules_to_save["default"].weight
    assert torch.equal(loaded.base_model.model.classifier.modules_to_save["default"].weight, head)
    assert not torch.equal(head, make("bert").classifier.weight)


@pytest.mark.parametrize("bias", ["all", "tucka_only"])
def test_biases_are_trained_where_asked_for(bias):
    model = get_peft_model(make("bert"), TuckAConfig(r=4, bias=bias, target_modules=["query"]))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and "tucka_" not in name}
    everywhere = {name for name, _ in model.named_parameters() if name.endswith("bias") and "tucka_" not in name}
    assert trainable == (everywhere if bias == "all" else {name for name in everywhere if "query" in name})


class Attention(nn.Module):
    """A model with layers that cannot be adapted beside ones that can."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.grouped = nn.Conv1d(8, 8, 1, groups=2)
        self.conv = nn.Conv1d(8, 8, 1)
        self.norm = nn.LayerNorm(8)
        self.narrow = nn.Linear(3, 8)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["linear", "attention"]}, "MultiheadAttention"),
        ({"target_modules": ["linear", "out_proj"]}, "only reads its weight"),
        ({"target_modules": ["linear", "grouped"]}, "groups=2"),
        ({"target_modules": ["linear", "norm"]}, "LayerNorm"),
        ({"target_modules": ["linear", "narrow"]}, "r: expected at most the width 3, got 4"),
        ({"target_modules": ["linear", "conv"], "routing": "token"}, "routing: expected 'batch' or 'sample'"),
        ({"target_modules": ["linear"], "router_module": "conv"}, "router_module: expected"),
        ({"target_modules": ["nothing"]}, "Target modules {'nothing'} not found"),
        ({"target_modules": ["linear"], "exclude_modules": ["linear"]}, "No modules were targeted"),
    ],
)
def test_unsuitable_targets_raise_and_leave_the_model_untouched(options, message):
    model = Attention()
    kinds_before = [type(module) for module in model.modules()]
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, TuckAConfig(r=4, **options))
    assert [type(module) for module in model.modules()] == kinds_before
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


@pytest.mark.parametrize("name", ["a.b", "keys", "training"])
def test_a_name_that_no_container_holds_is_refused(name):
    with pytest.raises(ConfigError, match="adapter_name: expected"):
        get_peft_model(make("plain"), config_for("plain"), adapter_name=name)


def test_adapters_per_sample_are_refused_instead_of_ignored():
    model = adapt("bert")
    with pytest.raises(ConfigError, match="adapter_names: expected None"):
        model(**inputs_for("bert"), adapter_names=["default", "__base__", "default"])


def replica_of(model):
    """One of the copies that nn.DataParallel computes on."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        replica._parameters = dict(module._parameters)
        replica._modules = {name: child and replicas[child] for name, child in module._modules.items()}
    return replicas[model]


def test_data_parallel_is_refused_while_a_router_runs():
    model, inputs = trained("bert")
    with pytest.raises(RouteError, match="accelerate launch"):
        replica_of(model)(**inputs)
    pin_route(model, group=0)
    assert torch.equal(output_of(replica_of(model), inputs), output_of(model, inputs))


def test_what_peft_has_for_lora_only_says_so(tmp_path):
    model = adapt("bert")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="only supports LORA"):
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(make("bert"), config_for("bert"), mixed=True)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("other", LoraConfig(target_modules=["query"]))
    with pytest.raises(TypeError, match="rank_pattern"):
        TuckAConfig(rank_pattern={"query": 2})


# Moving


@pytest.mark.parametrize("kind", ["llama", "vit"])
@torch.no_grad()
def test_a_model_that_is_cast_afterwards_computes_in_that_dtype(kind):
    with torch.enable_grad():
        model, inputs = trained(kind, dtype=torch.float64)
    before = output_of(model, inputs)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.3), (torch.float16, 0.05)):
        twin = copy.deepcopy(model).to(dtype)
        cast = {key: v.to(dtype) if v.is_floating_point() else v for key, v in inputs.items()}
        after = output_of(twin, cast)
        assert after.dtype == dtype
        torch.testing.assert_close(after.double(), before, rtol=0, atol=tolerance * float(before.abs().max()))
    assert output_of(copy.deepcopy(model).half(), cast).dtype == torch.float16


# Without a PeftModel


@pytest.mark.parametrize("low", [True, False])
@torch.no_grad()
def test_an_injected_adapter_takes_a_state_dict(low):
    with torch.enable_grad():
        model, inputs = trained("llama", routing="sample")
    state = get_peft_model_state_dict(model)
    bare = inject_adapter_in_model(config_for("llama", routing="sample"), make("llama"), low_cpu_mem_usage=low)
    result = set_peft_model_state_dict(bare, state, low_cpu_mem_usage=low)
    assert not result.unexpected_keys
    assert torch.equal(output_of(bare.eval(), inputs), output_of(model, inputs))
    found = get_peft_model_state_dict(bare)
    assert {"base_model.model." + key for key in found} == set(state)
    by_names = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    with pytest.warns(RuntimeWarning, match="additional target modules"):
        other = inject_adapter_in_model(TuckAConfig(r=4, k=3), make("llama"), state_dict=by_names)
    assert {row.name for row in adapted_modules(other)} == {row.name for row in adapted_modules(bare)}


# Copies


def copies(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    yield torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5", "plain"])
def test_copies_also_after_a_forward_with_a_graph_work_on_their_own(kind):
    model, inputs = trained(kind)
    loss = loss_of(model, inputs)
    expected, load = output_of(model, inputs), expert_load(model)
    for twin in copies(model):
        assert torch.equal(output_of(twin, inputs), expected)
        assert int(expert_load(twin).sum()) == int(load.sum()) + 1
        assert scope_of(twin) is not scope_of(model)
        root = twin.base_model.model
        assert scope_of(twin)._root is root
        assert "generate" not in vars(root) or vars(root)["generate"].model is root
        twin.unload()
        assert not root._forward_pre_hooks
    assert expert_load(model).tolist() == load.tolist()
    loss.backward()


# Reports


def test_the_router_counts_among_the_trainable_parameters(capsys):
    model = get_peft_model(make("bert"), TuckAConfig(r=4, k=3, target_modules=["query"]))
    per_layer = 2 * 2 + 3 * 2 * 4 * 4 + 16 * 4
    model.print_trainable_parameters()
    assert f"trainable params: {2 * per_layer + 3 * 2 * 16:,d} " in capsys.readouterr().out
    assert sum(row.parameters for row in adapted_modules(model)) == 2 * per_layer + 3 * 2 * 16
    assert [row.owns_router for row in adapted_modules(model)] == [True, False]
    assert "bert.encoder.layer.0.attention.self.query [default] Linear" in str(adapted_modules(model)[0])


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


def test_an_adapter_created_pinned_has_no_router_and_does_not_route(monkeypatch):
    model = adapt("bert", pinned_gates=[[0.5, 0.5], [0.0, 0.0], [0.0, 0.0]], init_weights=False)
    assert not any("router" in name for name in model.state_dict())
    assert torch.equal(last_route(model), torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.0, 0.0]]))
    loss_of(model, inputs_for("bert")).backward()
    with pytest.raises(RouteError, match="created pinned"):
        unpin_route(model)
