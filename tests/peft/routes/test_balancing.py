"""The temperature of a router, and the bias that keeps the choice of its groups balanced."""

import numpy as np
import pytest
import torch
from peft import PeftModel

import tucka
from support.adapting import adapt, snapshot, train
from support.tiny_models import inputs_for, loss_of, make, output_of, text
from tucka import reference
from tucka.backends.torch import Router
from tucka.backends.torch.routing.scope import scope_of
from tucka.errors import RouteError, ShapeError
from tucka.peft import (
    balance_router,
    expert_load,
    initialize_router,
    last_route,
    pin_route,
)
from tucka.spec import TuckerSpec

BATCHES = [text(batch=16, seed=seed) for seed in range(4)]


def router_of(model):
    return scope_of(model).router("default")


@pytest.mark.parametrize("temperature", [0.25, 8.0])
def test_the_routers_gates_are_those_of_the_reference_at_its_temperature(temperature):
    model = adapt("plain", routing="sample", temperature=temperature, dtype=torch.float64, affinity="dot")
    inputs = inputs_for("plain", dtype=torch.float64)
    output_of(model, inputs)
    centroids = router_of(model).centroids.detach().numpy()
    for row, gates in zip(inputs["x"].numpy(), last_route(model).numpy(), strict=True):
        logits = reference.affinity_logits(row, centroids, "dot", temperature=temperature)
        np.testing.assert_allclose(gates, reference.select_gates(logits), atol=1e-12)


def test_the_bias_moves_as_the_reference_and_shows_in_the_choice_alone():
    torch.manual_seed(0)
    spec = TuckerSpec(groups=3, routing="sample", balance_rate=0.25)
    router, plain = Router(spec, 6), Router(TuckerSpec(groups=3, routing="sample"), 6)
    hidden = torch.randn(40, 6)
    bias = np.zeros(3)
    for _ in range(6):
        gates = router(hidden)
        load = gates.any(dim=-1).sum(dim=0)
        bias = reference.moved_bias(bias, load.numpy(), 0.25)
        router.update_bias(load)
        np.testing.assert_allclose(router.choice_bias.numpy(), bias)
    desired = [
        reference.select_gates(logits.numpy(), True, bias) for logits in plain.logits(plain.feature(hidden)).detach()
    ]
    np.testing.assert_allclose(router(hidden).detach().numpy(), np.array(desired), atol=1e-6)


def test_the_bias_balances_a_router_that_had_collapsed():
    router = Router(TuckerSpec(groups=4, routing="sample", affinity="dot", balance_rate=0.05), 8)
    hidden = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) * 0.5 + 3

    def load():
        return router(hidden).any(dim=-1).sum(dim=0)

    before = tucka.load_entropy(load())
    for _ in range(200):
        router.update_bias(load())
    assert before < 0.7
    assert tucka.load_entropy(load()) > 0.98


def test_a_forward_leaves_the_bias_alone_and_without_a_rate_there_is_none():
    model = adapt("bert", balance_rate=0.1).train()
    initialize_router(model, BATCHES[:1], progress=False)
    before = snapshot(model)
    loss_of(model, inputs_for("bert")).backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any("choice_bias" in name for name in before)
    assert not any("choice_bias" in name for name in adapt("bert").state_dict())


def test_the_bias_is_saved_and_loaded(tmp_path):
    model = adapt("bert", routing="sample", balance_rate=0.5, temperature=2.0)
    balance_router(model, torch.tensor([5, 0, 1]))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make("bert"), tmp_path).eval()
    assert router_of(loaded).choice_bias.tolist() == [-0.5, 0.5, 0.5]
    assert router_of(loaded).spec.temperature == 2.0
    inputs = inputs_for("bert")
    torch.testing.assert_close(output_of(loaded, inputs), output_of(model, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bias_stays_wide_in_a_half_precision_model(dtype):
    router = Router(TuckerSpec(groups=2, balance_rate=1e-3), 4)
    router.update_bias(torch.tensor([9, 1]))
    router.to(dtype)
    for _ in range(999):
        router.update_bias(torch.tensor([9, 1]))
    assert router.center.dtype == dtype
    torch.testing.assert_close(router.choice_bias, torch.tensor([-1.0, 1.0]), atol=1e-4, rtol=0)
    assert router.double().choice_bias.dtype == torch.float64


def test_a_new_start_sets_the_bias_back():
    model = adapt("bert", balance_rate=0.5)
    balance_router(model, [5, 0, 1])
    initialize_router(model, BATCHES[:1], progress=False)
    assert router_of(model).choice_bias.tolist() == [0, 0, 0]


def test_balancing_refuses_what_does_not_fit():
    model = adapt("bert", balance_rate=0.5)
    with pytest.raises(ShapeError, match=r"load: expected .*k = 3"):
        balance_router(model, torch.ones(2))
    pin_route(model, group=0)
    with pytest.raises(RouteError, match="pinned"):
        balance_router(model, torch.ones(3))


def test_a_router_with_a_bias_compiles_whole():
    router = Router(TuckerSpec(groups=3, routing="sample", balance_rate=0.5), 6)
    compiled = torch.compile(router, fullgraph=True, backend="eager")
    hidden = torch.randn(4, 6)
    for load in ([1, 0, 0], [0, 9, 0]):
        torch.testing.assert_close(compiled(hidden), router(hidden))
        router.update_bias(torch.tensor(load))
    torch.testing.assert_close(compiled(hidden), router(hidden))


def test_training_without_the_trainer_balances_too():
    model = adapt("bert", routing="sample", balance_rate=0.5)
    train(model, inputs_for("bert"), steps=1)
    load = expert_load(model, reset=True)
    balance_router(model, load)
    expected = reference.moved_bias(np.zeros(3), load.numpy(), 0.5)
    np.testing.assert_allclose(router_of(model).choice_bias.numpy(), expected)
