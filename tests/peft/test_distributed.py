"""Two processes on torch's own engines take the decisions, and get the gradients, of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import support.ranks as ranks
from support.adapting import gradients
from support.tiny_models import loss_of
from tucka.backends.torch.routing.scope import scope_of
from tucka.peft import initialize_router, last_route, pin_route

pytestmark = pytest.mark.slow  # starting the processes takes most of the time


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process found: one list entry for each."""
    folder = tmp_path_factory.mktemp("ranks")
    tests = Path(ranks.__file__).parents[1]
    command = [sys.executable, "-W", "ignore", "-m", "support.ranks", str(folder)]
    processes = [
        subprocess.Popen(command, cwd=tests, env={**os.environ, "RANK": str(rank), "HF_HUB_OFFLINE": "1"})
        for rank in range(ranks.WORLD)
    ]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0] * ranks.WORLD
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks.WORLD)]


def in_one_process(kind, routing, seeds=(1, 2), *, started=True):
    model = ranks.whole_model(kind, routing, started=started)
    for seed in seeds:
        loss_of(model, ranks.whole_batch(kind, seed)).backward()
    return model


def assert_same_gradients(found, model):
    expected = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["plain", "bert"])
@pytest.mark.parametrize("routing", ranks.ROUTINGS)
@pytest.mark.parametrize("split", ranks.SPLITS)
def test_gradients_are_those_of_one_process_on_the_whole_batch(results, kind, routing, split):
    model = in_one_process(kind, routing, started=False)
    for found in results:
        assert_same_gradients(found[kind, routing, split]["gradients"], model)
    if routing == "batch":
        routes = [found[kind, routing, split]["route"] for found in results]
        assert torch.equal(routes[0], routes[1])
        torch.testing.assert_close(routes[0], last_route(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_uses_the_common_decision_again(results, reentrant):
    model = in_one_process("llama", "batch", started=False)
    for found in results:
        assert_same_gradients(found["checkpointed", reentrant]["gradients"], model)


def test_accelerate_accumulates_and_keeps_the_ranks_alike(results):
    model = in_one_process("bert", "batch")
    for found in results:
        assert found["accelerate"]["kind"] == "DistributedDataParallel"
        mean = {name: 2 * gradient for name, gradient in found["accelerate"]["gradients"].items()}
        assert_same_gradients(mean, model)
    saved = [found["accelerate"]["saved"] for found in results]
    assert all(torch.equal(value, saved[1][name]) for name, value in saved[0].items())
    before = ranks.whole_model("bert", "batch").state_dict()
    changed = {name for name, value in saved[0].items() if not torch.equal(value, before[name])}
    assert changed == set(gradients(model))


def test_a_pinned_adapter_trains_without_a_router(results):
    model = ranks.whole_model("plain", "batch")
    pin_route(model, group=1)
    for seed in (1, 2):
        loss_of(model, ranks.whole_batch("plain", seed)).backward()
    for found in results:
        assert_same_gradients(found["pinned"]["gradients"], model)
        assert not [name for name in found["pinned"]["gradients"] if "router" in name]


def test_without_synchronisation_each_process_decides_for_itself(results):
    for rank, found in enumerate(results):
        model = ranks.whole_model("plain", "batch")
        rows, _ = ranks.part_of(ranks.whole_batch("plain"), rank, "equal")
        loss_of(model, rows)
        assert torch.equal(found["sync off"], last_route(model))
    assert not torch.equal(results[0]["sync off"], results[1]["sync off"])


def test_one_process_evaluates_and_generates_alone(results):
    assert all(found["alone"] for found in results)


def test_initialisation_sees_the_data_of_all_processes(results):
    model = ranks.whole_model("llama", "sample", affinity="directional")
    batches = [batch for rank in range(ranks.WORLD) for batch in ranks.data_for_initialization(rank)]
    initialize_router(model, batches, progress=False)
    router = scope_of(model).router("default")
    for name, expected in (("centroids", router.centroids.detach()), ("center", router.center)):
        assert torch.equal(results[0]["initialized"][name], results[1]["initialized"][name])
        torch.testing.assert_close(results[0]["initialized"][name], expected)


def test_a_group_of_ranks_can_be_set(results):
    for found in results:
        assert torch.equal(found["group"], found["sync off"])


@pytest.mark.parametrize("routing", ranks.ROUTINGS)
def test_tensor_parallel_layers_compute_as_whole_ones(results, routing):
    base = ranks.make("llama", dtype=torch.float64, num_key_value_heads=2)
    model = ranks.whole_model("llama", routing, model=base, target_modules=ranks.UNCUT).eval()
    output = model(**ranks.inputs_for("llama", batch=4))
    output.loss.backward()
    for found in results:
        cut = found["tensor parallel"][routing]
        torch.testing.assert_close(cut["logits"], output.logits, rtol=0, atol=1e-9)
        assert_same_gradients(cut["gradients"], model)
        assert "a layer that sees its whole input" in cut["refused"]


def test_stages_of_a_pipeline_run_with_a_pinned_route_and_refuse_a_router_that_is_elsewhere(results):
    model = ranks.staged_model()
    pin_route(model, group=1)
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6)
    output = model(x)
    output.sum().backward()
    torch.testing.assert_close(results[-1]["stages"]["output"], output)
    expected = gradients(model)
    parts = [found["stages"]["gradients"] for found in results]
    assert parts[0].keys() | parts[1].keys() == expected.keys()
    for name, gradient in {**parts[0], **parts[1]}.items():
        torch.testing.assert_close(gradient, expected[name])
    assert [found["stages"]["refused"] == "" for found in results] == [True, False]
    assert "the layer with the router to be in the model" in results[1]["stages"]["refused"]


@pytest.mark.parametrize("engine", ["fsdp", "older fsdp"])
def test_fully_sharded_models_train_initialise_and_save(results, engine):
    model = in_one_process("llama", "batch", seeds=(1,))
    for found in results:
        assert_same_gradients(found[engine]["gradients"], model)
        torch.testing.assert_close(found[engine]["route"], last_route(model))
    saved = results[0][engine]["saved"]
    whole = ranks.whole_model("llama", "batch")
    initialize_router(whole, [ranks.text(batch=4, seed=rank) for rank in range(ranks.WORLD)], progress=False)
    state = {name.replace(".default", ""): value for name, value in whole.state_dict().items() if "tucka_" in name}
    assert saved.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(saved[name], value)
