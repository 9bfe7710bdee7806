"""Running a model over batches to see its routes: what is shown, what is taken, what is restored."""

import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from support.adapting import adapt
from support.tiny_models import WIDTH, make, output_of, text
from tucka.backends.torch.routing.scope import scope_of
from tucka.errors import ConfigError
from tucka.peft import (
    expert_load,
    initialize_router,
    pin_route,
)
from tucka.peft.routes.observation import RowSample, is_one_shot

BATCHES = [text(batch=16, seed=seed) for seed in range(6)]


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


@pytest.mark.parametrize("size", [2, 99])
def test_a_prepared_loader_gives_the_same_batches_afterwards(size):
    """Accelerate's loader counts its epochs, by which its sampler is seeded."""
    rows = [{name: value[row] for name, value in text(batch=12).items()} for row in range(12)]
    orders = []
    for look in (False, True):
        torch.manual_seed(0)
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
        loader = accelerator.prepare(DataLoader(rows, batch_size=4, shuffle=True))
        model = adapt("bert")
        torch.manual_seed(1)
        if look:
            active = accelerator.gradient_state.active_dataloader  # maybe of an earlier test, with an old version
            initialize_router(model, loader, max_batches=size, progress=False)
            assert accelerator.gradient_state.active_dataloader is active
        orders.append([batch["input_ids"].tolist() for _ in range(2) for batch in loader])
    assert orders[0] == orders[1]
    assert len(orders[0]) == 6


class Stream(IterableDataset):
    """Data that is read once."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def __iter__(self):
        return self.rows


def test_a_stream_that_loses_what_is_looked_at_is_told_of():
    loader = DataLoader(Stream(range(6)), batch_size=2)
    assert is_one_shot(loader)
    assert not any(map(is_one_shot, (DataLoader([1, 2]), [1], iter([1]), (n for n in [1]))))
    rows = [{name: value[row] for name, value in text(batch=12).items()} for row in range(12)]
    with pytest.warns(UserWarning, match="batches: expected data that can be gone through again"):
        initialize_router(adapt("bert"), DataLoader(Stream(rows), batch_size=4), max_batches=2, progress=False)


def test_modes_and_counts_come_back_after_an_error_too():
    model = adapt("bert").train()
    output_of(model, BATCHES[0])
    load = expert_load(model)
    with pytest.raises(ConfigError, match=r"batches: expected .*mappings"):
        initialize_router(model, [BATCHES[0], [1, 2]], progress=False)
    assert torch.equal(expert_load(model), load)
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
    with pytest.raises(ConfigError, match=r"batches: expected .*list"):
        initialize_router(model, loader, progress=False)


def test_a_sample_of_rows_is_bounded_uniform_and_the_same_for_a_seed():
    stream = [torch.arange(start, start + 10.0)[:, None] for start in range(0, 1000, 10)]

    def sample(limit, seed):
        kept = RowSample(limit, 1, seed=seed)
        for rows in stream:
            kept.add(rows)
            assert len(kept.gather()) <= limit
        return kept.gather().flatten()

    first = sample(100, 0)
    assert torch.equal(first, sample(100, 0))
    assert not torch.equal(first, sample(100, 1))
    assert len(first.unique()) == 100
    # The mean of 100 of 0..999 without replacement: 499.5 within five standard errors.
    assert abs(float(first.mean()) - 499.5) < 5 * 288.7 / 10
    assert torch.equal(sample(1000, 0), torch.arange(1000.0))
