"""A custom research model without PEFT: a small mixture network, routed by batch, sample or token."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

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


class TwoLayers(nn.Module):
    """Two adapted layers behind one router, in float64."""

    def __init__(self, routing):
        super().__init__()
        spec = TuckerSpec(rank=2, groups=3, routing=routing, alpha=0.5)
        self.router = Router(spec, 4)
        self.first = TuckerAdapter(nn.Linear(4, 5), spec, init_weights=False)
        self.second = TuckerAdapter(nn.Linear(5, 3), spec, init_weights=False)
        for layer in (self.first, self.second):
            layer.base_layer.requires_grad_(False)
        self.double()

    def forward(self, x):
        gates = self.router(x)
        return self.second(self.first(x, gates).tanh(), gates)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_derivatives_of_a_routed_model(routing):
    torch.manual_seed(0)
    model, x = TwoLayers(routing), torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def run(x, *values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    inputs = [x, *(model.get_parameter(name).detach().requires_grad_() for name in names)]
    assert gradcheck(run, inputs)


def test_gradients_reach_all_parts_and_the_chosen_groups_centroids():
    torch.manual_seed(0)
    model = TwoLayers("batch")
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    chosen = int(model.router(x).sum(dim=1).argmax())
    model(x).square().sum().backward()
    for layer in (model.first, model.second):
        assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parts.parameters())
    centroids, cores = model.router.centroids.grad, model.first.parts.cores.grad
    others = [group for group in range(3) if group != chosen]
    assert centroids[chosen].abs().sum() > 0
    assert cores[chosen].abs().sum() > 0
    # Zero tensors and not None: data-parallel training waits for every parameter's gradient.
    assert not centroids[others].any()
    assert not cores[others].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 8), (0, 4, 8), (3, 0, 8)])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_nothing_is_routed_and_adapted_to_nothing(routing, shape, dtype):
    router = Router(TuckerSpec(rank=3, groups=3, routing=routing), 8)
    adapter = TuckerAdapter(nn.Linear(8, 5).to(dtype), router.spec, init_weights=False)
    x = torch.zeros(shape, dtype=dtype, requires_grad=True)
    result = adapter(x, router(x))
    assert result.shape == (*shape[:-1], 5)
    result.float().sum().backward()
    # Zero tensors and not None, as from any other batch.
    assert all(p.grad is not None and not p.grad.any() for p in (x, *router.parameters(), *adapter.parts.parameters()))
