"""One function at a time, beside a frozen linear layer and LoRA's plain arithmetic.

    python -m pytest benchmarks/micro

Each function runs forward and backward ("training") and forward only ("inference"), on one thread. The sizes are those
of BERT-base: 8 samples of 128 tokens, 768 channels, rank 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from tucka.backends.torch import Router, householder_adapt, mix_cores, tucker_adapt, tucker_adapt_gated
from tucka.backends.torch.routing.choosing import gates_of
from tucka.spec import TuckerSpec

SAMPLES, TOKENS, WIDTH, RANK, GROUPS, EXPERTS, SLICES = 8, 128, 768, 8, 4, 2, 2

Run = Callable[[], Tensor]


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def activations() -> Tensor:
    return leaf(SAMPLES, TOKENS, WIDTH)


def parts() -> tuple[Tensor, Tensor, Tensor]:
    return leaf(WIDTH, RANK), leaf(GROUPS, SLICES, RANK, RANK), leaf(EXPERTS, SLICES)


def gates(*lead: int) -> Tensor:
    return gates_of(torch.randn(*lead, GROUPS, EXPERTS), gate_norm=True).requires_grad_()


def frozen_linear() -> Run:
    layer, x = nn.Linear(WIDTH, WIDTH).requires_grad_(False), activations()
    return lambda: layer(x)


def lora() -> Run:
    x, down, up = activations(), leaf(RANK, WIDTH), leaf(WIDTH, RANK)
    base = torch.randn(SAMPLES, TOKENS, WIDTH)
    return lambda: base + nn.functional.linear(nn.functional.linear(x, down), up) * 2.0


def adapt() -> Run:
    x, basis, core = activations(), parts()[0], leaf(RANK, RANK)
    return lambda: tucker_adapt(x, basis, core)


def adapt_gated(*lead: int) -> Callable[[], Run]:
    def prepare() -> Run:
        x, given, route = activations(), parts(), gates(*lead)
        return lambda: tucker_adapt_gated(x, *given, route)

    return prepare


def reflect() -> Run:
    x, vectors = activations(), leaf(WIDTH, RANK)
    return lambda: householder_adapt(x, vectors / vectors.norm(dim=0))


def mix(*lead: int) -> Callable[[], Run]:
    def prepare() -> Run:
        (_, cores, factor), route = parts(), gates(*lead)
        return lambda: mix_cores(cores, factor, route)

    return prepare


def select(*lead: int) -> Callable[[], Run]:
    def prepare() -> Run:
        logits = leaf(*lead, GROUPS, EXPERTS)
        return lambda: gates_of(logits, gate_norm=True)

    return prepare


def route(routing: str) -> Callable[[], Run]:
    def prepare() -> Run:
        router, x = Router(TuckerSpec(groups=GROUPS, routing=routing), WIDTH), activations()  # type: ignore[arg-type]
        return lambda: router(x)

    return prepare


FUNCTIONS: dict[str, Callable[[], Run]] = {
    "frozen linear": frozen_linear,
    "LoRA": lora,
    "tucker_adapt": adapt,
    "tucker_adapt_gated, batch": adapt_gated(),
    "tucker_adapt_gated, sample": adapt_gated(SAMPLES),
    "tucker_adapt_gated, token": adapt_gated(SAMPLES, TOKENS),
    "householder_adapt": reflect,
    "mix_cores, batch": mix(),
    "mix_cores, sample": mix(SAMPLES),
    "gates, batch": select(),
    "gates, token": select(SAMPLES, TOKENS),
    "Router, batch": route("batch"),
    "Router, sample": route("sample"),
    "Router, token": route("token"),
}


@pytest.fixture(autouse=True)
def _one_thread_and_one_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.benchmark(group="inference")
def test_inference(name: str, benchmark: Callable[[Run], Tensor]) -> None:
    run = FUNCTIONS[name]()
    with torch.inference_mode():
        assert benchmark(run).isfinite().all()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.benchmark(group="training")
def test_training(name: str, benchmark: Callable[[Run], Tensor]) -> None:
    run = FUNCTIONS[name]()
    gradient = torch.randn_like(run())

    def step() -> Tensor:
        result = run()
        result.backward(gradient)
        return result

    assert benchmark(step).isfinite().all()
