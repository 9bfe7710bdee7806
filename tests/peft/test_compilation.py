"""An adapted model compiles to one graph, in training and inference, and to no new one when only the group changes."""

import peft
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tucka.backends.torch.routing.scope import scope_of
from tucka.peft import TuckAConfig, expert_load, initialize_router


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def towards_each_group(router):
    """One input for each group, which the router sends there."""
    with torch.no_grad():
        return [router.centroids[group].sum(dim=0).expand(2, 5, 8).clone() for group in range(3)]


def stack(routing):
    """Two layers that PEFT has adapted, with a router that is started."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    config = TuckAConfig(r=3, k=3, routing=routing, target_modules=["0", "2"], init_weights=False)
    model = peft.get_peft_model(base, config)
    initialize_router(model, torch.randn(4, 6, 5, 8), progress=False)
    return model


@pytest.mark.parametrize(
    ("routing", "mode"),
    [
        ("batch", torch.enable_grad),
        pytest.param("batch", torch.inference_mode, marks=pytest.mark.slow),
        pytest.param("token", torch.no_grad, marks=pytest.mark.heavy),
        pytest.param("batch", torch.no_grad, marks=pytest.mark.slow),
        pytest.param("sample", torch.enable_grad, marks=pytest.mark.slow),
        pytest.param("sample", torch.inference_mode, marks=pytest.mark.slow),
        pytest.param("token", torch.enable_grad, marks=pytest.mark.slow),
        pytest.param("token", torch.inference_mode, marks=pytest.mark.slow),
    ],
)
def test_one_graph_serves_all_groups_of_a_model_that_peft_has_adapted(routing, mode):
    model = stack(routing).train(mode is torch.enable_grad)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    inputs = towards_each_group(scope_of(model).router("default"))
    for x in inputs:
        with mode():
            result = compiled(x)
            torch.testing.assert_close(result, model(x))
        if mode is torch.enable_grad:
            result.square().sum().backward()
            actual = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
            model.zero_grad()
            model(x).square().sum().backward()
            torch.testing.assert_close(actual, {name: model.get_parameter(name).grad for name in actual})
            model.zero_grad()
    assert (expert_load(model) > 0).all()
    # Each input ran compiled and not, and in training once more: all runs are counted.
    decisions = {"batch": 1, "sample": 2, "token": 10}[routing]
    assert int(expert_load(model).sum()) == decisions * len(inputs) * (3 if mode is torch.enable_grad else 2)
    assert counter.frame_count == 1


def test_looking_at_the_load_compiles_nothing_anew():
    model = stack("batch")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.inference_mode():
        for x in towards_each_group(scope_of(model).router("default")):
            compiled(x)
            assert int(expert_load(model, reset=True).sum()) == 1
    assert counter.frame_count == 1
    model(torch.randn(2, 5, 8)).sum().backward()  # training goes on counting
    assert int(expert_load(model).sum()) == 1


@pytest.mark.parametrize(
    "routing", ["batch", *(pytest.param(each, marks=pytest.mark.heavy) for each in ("sample", "token"))]
)
def test_an_exported_program_routes_and_counts_nothing(routing):
    """What a program writes to is not a constant of it, which ONNX and compiled packages refuse."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    config = TuckAConfig(r=2, k=3, routing=routing, init_weights=False, target_modules=["0", "2"])
    model, size = peft.get_peft_model(base, config).eval(), torch.export.Dim.AUTO
    with torch.no_grad():
        model(torch.randn(3, 5, 4))
        load = expert_load(model)
        program = torch.export.export(base, (torch.randn(3, 5, 4),), dynamic_shapes=({0: size, 1: size},), strict=False)
        assert torch.equal(expert_load(model), load)
        assert not program.graph_signature.buffers_to_mutate
        assert not any("add_" in str(node.target) for node in program.graph.nodes)
        for rows in range(2, 6):
            x = torch.randn(rows, rows + 2, 4)
            torch.testing.assert_close(program.module()(x), model(x))


def test_a_compiled_training_says_that_its_router_was_not_started():
    torch.manual_seed(0)
    config = TuckAConfig(r=3, k=3, routing="sample", target_modules=["0", "2"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), config).train()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with pytest.warns(UserWarning, match="router: expected a start from data before the model is compiled"):
        compiled(torch.randn(4, 5, 8))
    for _ in range(2):
        compiled(torch.randn(4, 5, 8))
    assert counter.frame_count == 1


def test_calls_that_are_not_compiled_between_those_that_are_compile_nothing_anew():
    model = stack("sample").train()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for x in torch.randn(3, 4, 5, 8):
        compiled(x)
        with torch.no_grad():
            model.eval()(x)
        model.train()(x.double().float())
    assert counter.frame_count == 1
