"""A router that nobody has started starts itself on its first batches in training, once there are enough of them."""

import copy

import pytest
import torch

import tucka
from support.adapting import adapt, gradients
from support.tiny_models import WIDTH, inputs_for, loss_of, text
from support.upstream import checkpoint_layers
from tucka.backends.torch.routing.scope import scope_of
from tucka.peft import expert_load, initialize_router, last_route, pin_route


def router_of(model):
    return scope_of(model).router("default")


def plain(routing, **options):
    return adapt("plain", routing=routing, k=4, init_weights=False, **options).train()


def vectors(*shape, seed=0):
    """Data with a large common mean, as hidden states have."""
    generator = torch.Generator().manual_seed(seed)
    return 5 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(9)) + torch.randn(
        *shape, WIDTH, generator=generator
    )


def batches_until_started(model, *shape, most=40):
    for number in range(most):
        if bool(router_of(model).is_initialized):
            return number
        model(x=vectors(*shape, seed=number)).sum().backward()
    return most


ENOUGH = [("batch", (16, 5), 8), ("batch", (1, 5), 8), ("sample", (16, 5), 1), ("sample", (1, 5), 8)]


@pytest.mark.parametrize(("routing", "shape", "wanted"), [*ENOUGH, ("token", (16, 5), 1)])
def test_it_starts_as_soon_as_there_are_enough_batches_and_rows(routing, shape, wanted):
    model = plain(routing)
    before = router_of(model).centroids.detach().clone()
    assert batches_until_started(model, *shape) == wanted
    assert not torch.equal(router_of(model).centroids, before)


@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
def test_its_groups_are_used_evenly_afterwards(routing):
    entropies = []
    for seed in range(4):
        model = plain(routing, router_seed=seed)
        batches_until_started(model, 16, 5)
        expert_load(model, reset=True)
        with torch.no_grad():
            for number in range(60):
                model(x=vectors(16, 5, seed=100 + number))
        entropies.append(tucka.load_entropy(expert_load(model)))
    assert sum(entropies) / len(entropies) > 0.85


@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
def test_no_input_is_its_own_centre(routing):
    """Else it would be routed by rounding errors, with gradients without bounds."""
    model = plain(routing)
    for number in range(40):
        model.zero_grad()
        x = vectors(1 if routing == "sample" else 8, 1, seed=number)
        model(x=x).sum().backward()
        assert router_of(model).centroids.grad.isfinite().all()
        assert router_of(model).centroids.grad.abs().max() < 100
        feature = x.mean(dim=(0, 1)) if routing == "batch" else x.flatten(0, -2)
        distance = torch.linalg.vector_norm(feature - router_of(model).center, dim=-1)
        assert (distance > 0.05).all()


@pytest.mark.parametrize("routing", ["batch", "sample"])
def test_graphs_of_batches_before_the_start_are_as_they_were(routing):
    """The start writes to centroids; forwards before it may still wait for their backward."""
    model = plain(routing)
    losses = []
    while not bool(router_of(model).is_initialized):
        twin = copy.deepcopy(model)
        x = vectors(8, 5, seed=len(losses))
        losses.append((model(x=x).square().mean(), twin(x=x).square().mean(), twin))
    for loss, of_twin, twin in losses[:-1]:
        model.zero_grad()
        loss.backward()
        of_twin.backward()
        ours, theirs = gradients(model), gradients(twin)
        assert ours.keys() == theirs.keys()
        assert ours["base_model.model.first.tucka_router.default.centroids"].any()
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, theirs[name])


def test_what_was_started_loaded_frozen_or_pinned_is_left_alone():
    started = plain("token")
    batches_until_started(started, 16, 5)
    loaded = plain("token")
    loaded.load_state_dict(started.state_dict())
    frozen, pinned, evaluated = plain("token"), plain("token"), plain("token").eval()
    router_of(frozen).requires_grad_(False)
    pin_route(pinned, group=1)
    for model in (started, loaded, frozen, pinned, evaluated):
        parameter = next(p for name, p in model.named_parameters() if name.endswith("centroids"))
        before = parameter.detach().clone()
        model(x=vectors(16, 5, seed=77))
        assert torch.equal(parameter, before)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_batch_counts_once_however_often_it_is_computed(checkpointed):
    model = adapt("llama", routing="batch", k=3).train()
    if checkpointed:
        checkpoint_layers(model)
        model.enable_input_require_grads()
    for number in range(8):
        assert not bool(router_of(model).is_initialized)
        loss_of(model, inputs_for("llama", batch=6, seed=number)).backward()
    assert bool(router_of(model).is_initialized)
    model(**text(batch=2))
    assert last_route(model).isfinite().all()


@pytest.mark.parametrize("routing", ["batch", "token"])
def test_a_model_in_half_precision_starts_too(routing):
    model = adapt("plain", dtype=torch.bfloat16, routing=routing, k=4, init_weights=False).train()
    losses = [model(x=vectors(16, 5, seed=number).bfloat16()).square().mean() for number in range(8)]
    assert bool(router_of(model).is_initialized)
    sum(losses).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize("way", ["deleted", "initialised"])
def test_first_batches_are_forgotten_with_their_adapter_or_its_wait(way):
    model = plain("batch")
    model(x=vectors(4, 5))
    first = scope_of(model).maker.first
    assert len(first["default"][""].batches) == 1
    if way == "deleted":
        scope_of(model).forget("default")
        assert not first
    else:
        initialize_router(model, vectors(4, 4, 5), progress=False)
        model(x=vectors(4, 5))
        assert not first["default"]
