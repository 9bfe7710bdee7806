"""How adapters start: as their base, and with a gradient wherever there is something to learn."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tucka import reference
from tucka.backends.torch.modules import ExpertParts
from tucka.spec import TuckerSpec

SIZES = {"rank": st.integers(1, 7), "k": st.integers(1, 3), "t": st.integers(1, 4), "p": st.integers(1, 4)}


def started(rank, k, t, p, **options):
    spec = TuckerSpec(rank=rank, groups=k, experts_per_group=t, expert_rank=p)
    return ExpertParts(spec, 9, **options).double()


@given(seed=st.integers(0, 99), **SIZES)
def test_every_expert_is_zero_and_all_lead_alike_to_the_zero_half(seed, rank, k, t, p):
    torch.manual_seed(seed)
    parts = started(rank, k, t, p)
    cores, factor, basis = (tensor.detach().numpy() for tensor in parts.factors())
    assert not any(reference.expert(cores, factor, basis, i, j).any() for i in range(k) for j in range(t))
    read = -(-rank // 2)
    gram = parts.basis[:, :read].T @ parts.basis[:, :read]
    torch.testing.assert_close(gram, torch.eye(read).double(), atol=1e-5, rtol=0)
    assert not parts.basis[:, read:].any()
    inner = torch.einsum("jq,kqab->kjab", parts.expert_factor, parts.cores)
    wanted = torch.zeros(rank, rank, dtype=torch.float64)
    wanted[range(rank // 2), range(read, rank)] = 12.0 / rank**0.5  # 24, and 2 for a weight that cannot be read
    torch.testing.assert_close(inner, wanted.expand_as(inner), atol=1e-5, rtol=0)


@given(seed=st.integers(0, 99), **SIZES)
def test_the_zero_half_learns_at_once_and_all_else_within_three_steps(seed, rank, k, t, p):
    torch.manual_seed(seed)
    parts = started(rank, k, t, p)
    before = {name: value.clone() for name, value in parts.named_parameters()}
    x, gates = torch.randn(20, 9, dtype=torch.float64), torch.rand(k, t, dtype=torch.float64)
    aim = torch.randn(20, 9, dtype=torch.float64)
    optimizer = torch.optim.SGD(parts.parameters(), lr=1e-3)
    for step in range(3):
        optimizer.zero_grad()
        (parts(x, x, gates) * aim).sum().backward()
        if step == 0 and rank > 1:
            assert parts.basis.grad[:, -(rank // 2) :].all()
        optimizer.step()
    for name, value in parts.named_parameters():
        assert (value != before[name]).all(), name


@pytest.mark.parametrize("rank", [1, 4])
def test_a_random_start_shows(rank):
    torch.manual_seed(0)
    parts, x = started(rank, 2, 2, 2, init_weights=False), torch.randn(3, 9).double()
    assert not torch.allclose(parts(x, x, torch.rand(2, 2).double()), x, atol=1e-2)
