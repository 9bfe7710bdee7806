"""Pinning and unpinning a route: measured or given, and in a merged model."""

import contextlib

import pytest
import torch
from peft import get_peft_model

from support.adapting import adapt
from support.bases import make_base, run
from support.tiny_models import make, output_of, text
from tucka.errors import ConfigError, RouteError
from tucka.peft import TuckAConfig, expert_load, given_route, last_route, load_adapter, pin_route, unpin_route

BATCHES = [text(batch=16, seed=seed) for seed in range(6)]


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
        with pytest.raises(ConfigError, match=r"gates: expected .*\(2, 2\)"):
            pin_route(model, gates=gates)
    exact = torch.full((2, 2), 0.1, dtype=torch.float64)
    assert torch.equal(pin_route(model.double(), gates=exact), exact)


def test_a_padded_sample_counts_in_no_measured_route():
    """Neither its tokens nor, where all of it is padding, the sample."""
    for routing in ("sample", "token"):
        model = adapt("bert", routing=routing, affinity="dot")
        whole = text(batch=4)
        padded = {key: torch.cat([value, torch.zeros_like(value[:1])]) for key, value in whole.items()}
        torch.testing.assert_close(pin_route(model, batches=[padded]), pin_route(model, batches=[whole]))


# While merged


def merged(**options):
    """A merged model, its base, and inputs."""
    base, targets, inputs = make_base("bert", dtype=torch.float64)
    config = TuckAConfig(r=2, target_modules=targets, init_weights=False, affinity="dot", **options)
    model = get_peft_model(base, config).eval()
    pin_route(model, group=0)
    model.merge_adapter()
    return model, inputs


@pytest.mark.parametrize("way", ["gates", "group", "batches"])
@torch.no_grad()
def test_pinning_another_route_unmerges_first(way, tmp_path):
    model, inputs = merged()
    arguments = {"gates": {"gates": [[0.1, 0.2], [0, 0]]}, "group": {"group": 1}, "batches": {"batches": [inputs]}}
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        gates = pin_route(model, **arguments[way])
    assert not model.get_model_status().merged_adapters
    wanted = run(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(make_base("bert", dtype=torch.float64)[0], tmp_path)
    assert torch.equal(last_route(loaded).double(), gates.double())
    torch.testing.assert_close(run(loaded.double(), inputs), wanted)
    model.merge_adapter()
    torch.testing.assert_close(run(model, inputs), wanted)


@torch.no_grad()
def test_unpinning_unmerges_first_and_the_adapter_is_routed_again():
    model, inputs = merged(routing="sample")
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        unpin_route(model)
    assert not model.get_model_status().merged_adapters
    run(model, inputs)
    assert last_route(model).shape == (2, 2, 2)


@torch.no_grad()
def test_a_given_route_unmerges_first_and_is_not_merged():
    model, inputs = merged()
    with contextlib.ExitStack() as stack:
        with pytest.warns(UserWarning, match="Unmerging the model first"):
            stack.enter_context(given_route(model, groups=1))
        given = run(model, inputs)
        with pytest.raises(RouteError, match="given_route"):
            model.merge_adapter()
    pin_route(model, group=1)
    torch.testing.assert_close(run(model, inputs), given)


@torch.no_grad()
def test_a_pin_that_is_refused_leaves_the_model_merged():
    model, _ = merged()
    for arguments in ({}, {"group": 5}, {"gates": [[1]]}):
        with pytest.raises(ConfigError):
            pin_route(model, **arguments)
        assert model.get_model_status().merged_adapters == ["default"]


@torch.no_grad()
def test_a_merged_model_is_saved_as_it_runs(tmp_path):
    model, inputs = merged()
    model.save_pretrained(tmp_path)
    loaded = load_adapter(make_base("bert", dtype=torch.float64)[0], tmp_path)
    torch.testing.assert_close(run(loaded.double(), inputs), run(model, inputs))
