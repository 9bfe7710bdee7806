"""One decision for all ranks, in one process: the sum over ranks stands for a second rank with the same data."""

import pytest
import torch
import torch.distributed as dist

from tucka.backends.torch import Router
from tucka.backends.torch.routing.ranks import gates_over_ranks
from tucka.backends.torch.routing.starting import FirstBatches, features_of
from tucka.spec import TuckerSpec


@pytest.fixture
def twice(monkeypatch):
    """Let all_reduce find a second rank that has sent the same."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group=None: tensor.mul_(2))


def router(dtype=torch.float32, **options):
    spec = TuckerSpec(rank=2, groups=3, **{"routing": "batch", "affinity": "dot", "factor_norm": None, **options})
    return Router(spec, in_features=5).to(dtype)


def samples(*, dtype=torch.float32):
    hidden = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[0, 4:] = 0
    mask[2] = 0  # a sample without a token
    return hidden, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_samples_without_tokens_count_on_no_rank(twice, dtype):
    hidden, mask = samples(dtype=dtype)
    mine = router(dtype)
    kept = torch.tensor([0, 1, 3])
    common = gates_over_ranks(mine, hidden, mask)
    assert torch.allclose(common, mine(hidden[kept], mask[kept]), atol=1e-3)
    assert torch.allclose(mine(hidden, mask), mine(hidden[kept], mask[kept]), atol=1e-3)


def test_each_ranks_part_gets_the_gradients_of_all(twice):
    hidden, mask = samples()
    mine, gradients = router(), []
    for decide in (lambda x: gates_over_ranks(mine, x, mask), lambda x: mine(x, mask)):
        x = hidden.clone().requires_grad_()
        (decide(x) * torch.tensor([1.0, 3.0])).sum().backward()
        gradients.append(x.grad)
    assert gradients[1].abs().max() > 0
    # Two ranks with the same data: half of the weight of each number in the mean, and the gradients of both losses.
    torch.testing.assert_close(gradients[0], gradients[1])


def test_padding_that_counts_counts_at_the_start_too():
    hidden, mask = samples()
    mine = router(routing="sample")
    torch.testing.assert_close(
        features_of(mine, hidden, mask),
        hidden[[0, 1, 3]].clone().where((mask[[0, 1, 3]] != 0)[..., None], torch.zeros(())).sum(1)
        / mask[[0, 1, 3]].sum(1, keepdim=True),
    )
    mine.count_padding = True
    torch.testing.assert_close(features_of(mine, hidden, mask), hidden.mean(dim=1))


def test_the_mean_of_each_batch_is_taken_from_its_samples(monkeypatch):
    """A batch router starts from how means vary and how samples vary around them, not from both at once."""
    seen = {}

    def like_batches(means, deviations, *, batch_size):
        seen.update(means=means, deviations=deviations, batch_size=batch_size)
        return torch.randn(64, 5)

    monkeypatch.setattr("tucka.backends.torch.routing.starting.like_batches", like_batches)
    mine, first = router(affinity="directional"), FirstBatches()
    batches = [torch.randn(6, 5) + 10 * number for number in range(8)]
    assert [first.start(mine, batch, None) for batch in batches] == [False] * 7 + [True]
    torch.testing.assert_close(seen["means"], torch.stack([batch.mean(dim=0) for batch in batches]))
    torch.testing.assert_close(seen["deviations"], torch.cat([batch - batch.mean(dim=0) for batch in batches]))
    assert seen["batch_size"] == 6
