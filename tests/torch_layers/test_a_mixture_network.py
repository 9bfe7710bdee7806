"""A custom research model without PEFT: a small mixture network, routed by batch, sample or token."""

import copy
import threading

import pytest
import torch
from torch import nn

from tucka.backends.torch import Router, TuckerAdapter
from tucka.spec import TuckerSpec

ROUTINGS = ["batch", "sample", "token"]


class Mixture(nn.Module):
    """Two frozen layers whose inputs are adapted by experts that one router gates."""

    def __init__(self, routing):
        super().__init__()
        spec = TuckerSpec(rank=4, groups=3, routing=routing)
        self.router = Router(spec, in_features=16)
        self.up = TuckerAdapter(nn.Linear(16, 32).requires_grad_(False), spec)
        self.down = TuckerAdapter(nn.Linear(32, 16).requires_grad_(False), spec)

    def forward(self, x, mask=None):
        gates = self.router(x, mask)
        return self.down(torch.relu(self.up(x, gates)), gates)


def base(model, x):
    return model.down.base_layer(torch.relu(model.up.base_layer(x)))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_it_starts_as_its_base_and_learns(routing):
    torch.manual_seed(0)
    model, x = Mixture(routing), torch.randn(4, 6, 16)
    assert torch.equal(model(x), base(model, x))
    target = torch.randn(4, 6, 16)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def trained(routing):
    torch.manual_seed(1)
    model = Mixture(routing)
    for layer in (model.up, model.down):
        nn.init.normal_(layer.parts.cores)
    return model


def test_a_samples_output_does_not_depend_on_its_batch_mates():
    model, x = trained("sample"), torch.randn(4, 6, 16)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


def test_a_tokens_output_does_not_depend_on_other_tokens():
    model, x = trained("token"), torch.randn(4, 6, 16)
    torch.testing.assert_close(model(x)[:, :2], model(x[:, :2]))


def test_padding_does_not_change_a_batch():
    model, x = trained("batch"), torch.randn(4, 6, 16)
    padded = torch.cat([x, torch.full((4, 3, 16), 7.0)], dim=1)
    mask = torch.cat([torch.ones(4, 6), torch.zeros(4, 3)], dim=1)
    torch.testing.assert_close(model(padded, mask)[:, :6], model(x))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_copies_and_saved_states_compute_the_same(routing, tmp_path):
    model, x = trained(routing), torch.randn(4, 6, 16)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = Mixture(routing)
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(other(x), expected)


def test_two_models_in_two_threads_share_nothing():
    models = [trained("batch"), Mixture("token")]
    nn.init.normal_(models[1].up.parts.cores)
    inputs = [torch.randn(4, 6, 16), torch.randn(2, 9, 16)]
    expected = [gradients(model, x) for model, x in zip(models, inputs, strict=True)]
    seen = [[], []]
    barrier = threading.Barrier(2)

    def work(index):
        barrier.wait()
        for _ in range(20):
            seen[index].append(gradients(models[index], inputs[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert len(seen[index]) == 20
        for found in seen[index]:
            torch.testing.assert_close(found, expected[index])


def gradients(model, x):
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(model(x).square().sum(), list(trainable.values()))
    return dict(zip(trainable, found, strict=True))
