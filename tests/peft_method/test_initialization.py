"""Data-aware initialisation: balanced, done once, and nobody can tell from anything else that it was done."""

import random

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch.utils.data import DataLoader, TensorDataset

import tucka
from support.adapting import adapt, config_for, snapshot
from support.tiny_models import WIDTH, inputs_for, make, output_of, text
from tucka.backends.torch.routing.scope import scope_of
from tucka.errors import ConfigError, RouteError
from tucka.peft import TuckAConfig, expert_load, initialize_router, last_route, pin_route

BATCHES = [text(batch=16, seed=seed) for seed in range(6)]


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


def test_a_forward_never_initialises():
    model = adapt("bert")
    before = snapshot(model)
    output_of(model.train(), inputs_for("bert"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not bool(scope_of(model).router("default").is_initialized)


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
    made = []
    scope_of(model).observers["default"] = lambda x, mask, gates: made.append((x, mask))
    with torch.no_grad():
        output_of(model, batch)
    x, mask = made[0]
    means = (x * mask[..., None]).sum(1)[:3] / mask.sum(1)[:3, None]
    initialize_router(model, [batch], progress=False)
    torch.testing.assert_close(scope_of(model).router("default").center, means.mean(0))


def random_numbers():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]


def test_modes_and_random_numbers_stay_as_they_were():
    model = adapt("bert", model=make("bert", hidden_dropout_prob=0.3)).train()
    model.base_model.model.bert.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    own = torch.Generator().manual_seed(5)
    data = [{name: value[row] for name, value in text(batch=12).items()} for row in range(12)]
    loader = DataLoader(data, batch_size=4, shuffle=True, generator=own)
    numbers = []
    for look in (False, True):
        torch.manual_seed(1), np.random.seed(2), random.seed(3), own.manual_seed(4)
        if look:
            initialize_router(model, loader, progress=False)
            pin_route(model, batches=BATCHES[:1])
        numbers.append((random_numbers(), torch.rand(2, generator=own).tolist()))
    assert numbers[0] == numbers[1]
    assert [module.training for module in model.modules()] == modes


def test_modes_come_back_after_an_error_too():
    model = adapt("bert").train()
    with pytest.raises(ConfigError, match="batches: expected mappings"):
        initialize_router(model, [[1, 2]], progress=False)
    assert all(module.training for module in model.modules())
    assert not scope_of(model).observers


def test_a_progress_bar_is_shown_unless_declined(capsys):
    initialize_router(adapt("bert"), BATCHES[:2])
    assert "TuckA router" in capsys.readouterr().err
    initialize_router(adapt("bert"), BATCHES[:2], progress=False)
    assert capsys.readouterr().err == ""


def test_at_most_so_many_batches_are_taken():
    taken = []

    def batches():
        for batch in BATCHES:
            taken.append(batch)
            yield batch

    initialize_router(adapt("bert"), batches(), max_batches=2, progress=False)
    assert len(taken) == 2


def test_plain_models_take_tensors_and_no_pairs():
    model = adapt("plain", routing="sample")
    initialize_router(model, torch.randn(6, 10, WIDTH), progress=False)
    assert bool(scope_of(model).router("default").is_initialized)
    loader = DataLoader(TensorDataset(torch.randn(4, WIDTH), torch.zeros(4)), batch_size=2)
    with pytest.raises(ConfigError, match="got list"):
        initialize_router(model, loader, progress=False)


def test_what_cannot_be_initialised_says_why():
    model = adapt("bert")
    with pytest.raises(ConfigError, match="batches: expected at least one batch"):
        initialize_router(model, [], progress=False)
    with pytest.raises(ConfigError, match="max_batches: expected a whole number of at least 1, got -1"):
        initialize_router(model, BATCHES, max_batches=-1, progress=False)
    model.add_adapter("other", config_for("bert"))
    with pytest.raises(ConfigError, match="adapter_name: expected an active adapter, got 'other'"):
        initialize_router(model, BATCHES, adapter_name="other", progress=False)
    pin_route(model, group=0)
    with pytest.raises(RouteError, match="pinned"):
        initialize_router(model, BATCHES, progress=False)
    created = adapt("bert", pinned_gates=[[1.0, 0.0]] * 3)
    with pytest.raises(RouteError, match="created pinned"):
        pin_route(created, batches=BATCHES)


def test_the_same_seed_gives_the_same_router():
    routers = []
    for seed in (0, 0, 1):
        model = adapt("bert", router_seed=seed)
        initialize_router(model, BATCHES, progress=False)
        routers.append(scope_of(model).router("default").centroids)
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])


@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
def test_a_measured_route_is_the_mean_of_the_decisions(routing):
    model = adapt("bert", routing=routing, affinity="dot")
    decisions = []
    for batch in BATCHES:
        with torch.no_grad():
            output_of(model, batch)
        decisions.append(last_route(model).reshape(-1, 3, 2))
    load = expert_load(model)
    expected = torch.cat(decisions)
    torch.testing.assert_close(pin_route(model, batches=BATCHES), expected.mean(0))
    assert torch.equal(expert_load(model), load)
    group = int(expected.sum((0, 2)).argmax())
    chosen = expected[(expected[:, group] != 0).any(-1)].mean(0)
    torch.testing.assert_close(pin_route(model, batches=BATCHES, group=group), chosen)
    assert pin_route(model, group=1).tolist() == [[0, 0], [0.5, 0.5], [0, 0]]


def test_the_kind_of_pin_must_be_clear():
    model = get_peft_model(make("bert"), TuckAConfig(r=2, target_modules=["query"]))
    for arguments in ({}, {"gates": [[1, 0], [0, 0]], "group": 0}, {"group": 5}, {"group": True}):
        with pytest.raises(ConfigError):
            pin_route(model, **arguments)
    for gates in ([[1]], [[1, 0], [0]], "text"):
        with pytest.raises(ConfigError, match=r"gates: expected finite numbers of shape \(2, 2\)"):
            pin_route(model, gates=gates)
    exact = torch.full((2, 2), 0.1, dtype=torch.float64)
    assert torch.equal(pin_route(model.double(), gates=exact), exact)
