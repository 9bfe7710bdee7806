"""What PEFT's users rely on: start, training, dtypes, copies, reports, and what is refused."""

import copy
import io
import pickle

import pytest
import torch
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter

from support.adapting import adapt, config_for, snapshot, train, trained
from support.refusals import refused
from support.tiny_models import KINDS, inputs_for, loss_of, make, output_of
from tucka.backends.torch.routing.scope import scope_of
from tucka.errors import RouteError
from tucka.peft import (
    TuckAConfig,
    adapted_modules,
    expert_load,
    initialize_router,
    last_route,
    pin_route,
    unpin_route,
)

kinds = pytest.mark.parametrize("kind", KINDS)
routings = pytest.mark.parametrize("routing", ["batch", "sample", "token"])


@pytest.mark.each_value
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


@pytest.mark.each_value
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
    started = {name for name in changed if name.endswith(("center", "is_initialized"))}  # by the first batch
    assert changed - started == trainable
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(output_of(model, inputs_for(kind)), base_output)


@pytest.mark.filterwarnings("ignore:t. expected at least 2:UserWarning")
def test_with_one_expert_the_router_gets_a_gradient_of_zeros():
    model = adapt("bert", t=1)
    loss_of(model.train(), inputs_for("bert"))  # starts the router
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


@pytest.mark.each_value
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
    with pytest.raises(ValueError, match="LORA"):
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    with pytest.raises(ValueError, match="PeftMixedModel"):
        get_peft_model(make("bert"), config_for("bert"), mixed=True)
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("other", LoraConfig(target_modules=["query"]))
    with pytest.raises(TypeError, match="use_dora"):
        TuckAConfig(use_dora=True)


# Moving


@pytest.mark.parametrize("kind", ["llama", "vit"])
@torch.no_grad()
def test_a_model_that_is_cast_afterwards_computes_in_that_dtype(kind):
    with torch.enable_grad():
        model, inputs = trained(kind, dtype=torch.float64)
    pin_route(model, group=1)  # close choices of a router differ in half precision, as the hidden states do
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


def test_an_adapter_created_pinned_has_no_router_and_does_not_route(monkeypatch):
    model = adapt("bert", pinned_gates=[[0.5, 0.5], [0.0, 0.0], [0.0, 0.0]], init_weights=False)
    assert not any("router" in name for name in model.state_dict())
    assert torch.equal(last_route(model), torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.0, 0.0]]))
    loss_of(model, inputs_for("bert")).backward()
    with refused(RouteError, "adapter_name", "router | none"):
        unpin_route(model)


def test_torch_averages_all_of_a_model():
    model = adapt("bert", routing="sample", balance_rate=0.1, init_weights=False).eval()
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    initialize_router(model, [inputs_for("bert", batch=6)], progress=False)
    start = scope_of(average).router("default").center.clone()
    average.update_parameters(model)
    router, averaged = scope_of(model).router("default"), scope_of(average).router("default")
    torch.testing.assert_close(averaged.center, (start + router.center) / 2)
    assert not averaged.waits
    assert torch.isfinite(output_of(average, inputs_for("bert"))).all()
