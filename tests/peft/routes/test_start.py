"""Starting a router from data: even groups, done once, and nothing else of the model changes."""

import pytest
import torch

import tucka
from support.adapting import adapt, config_for, snapshot, watched
from support.refusals import refused
from support.tiny_models import output_of, text
from tucka.backends.torch.routing.scope import scope_of
from tucka.core.centroids import kaiming_centroids
from tucka.errors import ConfigError, RouteError
from tucka.peft import (
    expert_load,
    initialize_router,
    pin_route,
)

BATCHES = [text(batch=16, seed=seed) for seed in range(6)]


def router_of(model):
    return scope_of(model).router("default")


@pytest.mark.each_value
@pytest.mark.parametrize("affinity", ["directional", "centered", "dot", "group_norm"])
@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
def test_only_the_router_changes_and_remembers(affinity, routing):
    model = adapt("bert", affinity=affinity, routing=routing)
    before = snapshot(model)
    initialize_router(model, BATCHES, progress=False)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    owned = {"centroids", "is_initialized"} | ({"center"} if affinity in ("directional", "centered") else set())
    assert {name.rpartition(".")[2] for name in changed} == owned
    assert bool(scope_of(model).router("default").is_initialized)
    assert expert_load(model).tolist() == [0, 0, 0]
    assert scope_of(model).router("default").centroids.requires_grad


def test_the_groups_are_used_evenly_afterwards():
    model = adapt("llama", routing="sample", k=4)
    for batch in BATCHES:
        with torch.no_grad():
            output_of(model, batch)
    before = tucka.load_entropy(expert_load(model))
    initialize_router(model, BATCHES, progress=False)
    for batch in BATCHES:
        with torch.no_grad():
            output_of(model, batch)
    assert tucka.load_entropy(expert_load(model)) > max(before, 0.8)


def test_the_centre_is_the_mean_of_unmasked_samples():
    model = adapt("llama", routing="sample")
    batch = text(batch=4)
    batch["attention_mask"][0, :3] = 0
    batch["attention_mask"][3] = 0
    made = watched(model)
    with torch.no_grad():
        output_of(model, batch)
    x, mask, _ = made[0]
    means = (x * mask[..., None]).sum(1)[:3] / mask.sum(1)[:3, None]
    initialize_router(model, [batch], progress=False)
    torch.testing.assert_close(scope_of(model).router("default").center, means.mean(0))


@pytest.mark.parametrize("affinity", ["directional", "dot"])
@pytest.mark.parametrize("way", ["dai", "kaiming"])
def test_each_way_to_start_a_router_is_the_cores(way, affinity):
    model = adapt("plain", routing="sample", router_init=way, affinity=affinity, router_seed=4)
    rows = torch.randn(6, 10, 16) + 3
    initialize_router(model, rows, scale=0.5 if way == "dai" else None, progress=False)
    features = rows.reshape(-1, 16)
    center = features.mean(dim=0) if affinity == "directional" else torch.zeros(16)
    if way == "kaiming":
        expected = torch.from_numpy(kaiming_centroids((3, 2, 16), seed=4)).float()
    else:
        options = {"groups": 3, "experts_per_group": 2, "scale": 0.5, "seed": 4}
        expected = tucka.data_aware_centroids(features - center, **options)
    torch.testing.assert_close(router_of(model).centroids.detach(), expected)
    torch.testing.assert_close(router_of(model).center, center)


def test_a_scale_needs_the_start_that_has_one():
    with pytest.raises(ConfigError, match=r"scale: expected .*kaiming"):
        initialize_router(adapt("bert", router_init="kaiming"), BATCHES, scale=1.0, progress=False)


@pytest.mark.parametrize("batches", [1, 2])
def test_fewer_batches_than_experts_suffice(batches):
    model = adapt("llama", routing="batch", k=8)
    initialize_router(model, [text(batch=2, seed=seed) for seed in range(batches)], progress=False)
    assert torch.isfinite(router_of(model).centroids).all()
    assert router_of(model).centroids.flatten(1).norm(dim=1).min() > 0


def test_batches_of_alike_samples_are_split_evenly_too():
    # Samples vary most along one axis and batches along another, as batches sorted by length do.
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(400, 1, 16, generator=generator) * torch.tensor([1.0, 3.0] + 14 * [0.01])
    rows = shared + torch.randn(400, 8, 16, generator=generator) * torch.tensor([9.0] + 15 * [0.01])
    model = adapt("plain", routing="batch", k=4, t=1, gate_norm=False)
    initialize_router(model, rows[:40], max_batches=40, progress=False)
    with torch.no_grad():
        for batch in rows[40:]:
            model(batch)
    assert tucka.load_entropy(expert_load(model)) > 0.9


def test_what_cannot_be_initialised_says_why():
    model = adapt("bert")
    with pytest.raises(ConfigError, match="batches: expected"):
        initialize_router(model, [], progress=False)
    with pytest.raises(ConfigError, match=r"max_batches: expected .*at least 1"):
        initialize_router(model, BATCHES, max_batches=-1, progress=False)
    model.add_adapter("other", config_for("bert"))
    with pytest.raises(ConfigError, match=r"adapter_name: expected .*active.*other.*set_adapter"):
        initialize_router(model, BATCHES, adapter_name="other", progress=False)
    pin_route(model, group=0)
    with pytest.raises(RouteError, match="pinned"):
        initialize_router(model, BATCHES, progress=False)
    created = adapt("bert", pinned_gates=[[1.0, 0.0]] * 3)
    with refused(RouteError, "adapter_name", "router | none"):
        pin_route(created, batches=BATCHES)


def test_the_same_seed_gives_the_same_router():
    routers = []
    for seed in (0, 0, 1):
        model = adapt("bert", router_seed=seed)
        initialize_router(model, BATCHES, progress=False)
        routers.append(scope_of(model).router("default").centroids)
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])
