"""Token routing where some layers see other tokens than those that were routed, or the same in another order."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from support.routed import EXACT, family, inputs_of, logits, routed
from support.tiny_models import WIDTH
from tucka.peft import given_route, last_route


def hidden(batch=3, length=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64)


class WindowAttention(nn.Module):
    """A layer of windows, of a class that is known."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.qkv(x)


class Windows(nn.Module):
    """Windows of two tokens, in some order, between two layers that see the tokens as they came."""

    def __init__(self, order=range(6)):
        super().__init__()
        self.order = list(order)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.attn = WindowAttention()
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        windows = self.attn(x[:, self.order].reshape(-1, 2, WIDTH)).reshape(x.shape)
        x = x + windows[:, torch.tensor(self.order).argsort()]
        return self.last(x)


@pytest.mark.parametrize("targets", [["first", "qkv", "last"], ["qkv", "last"]])
@torch.no_grad()
def test_no_token_gets_the_route_of_another(targets):
    def outputs(order):
        torch.manual_seed(0)
        return routed(Windows(order), targets, "token")(hidden())

    torch.testing.assert_close(outputs([3, 0, 5, 1, 4, 2]), outputs(range(6)), **EXACT)


@pytest.mark.parametrize(("name", "targets"), [("swin", None), ("swin", "all-linear"), ("timesformer", None)])
def test_the_mean_of_a_samples_tokens_is_the_route_where_windows_come_first(name, targets):
    model, inputs = family(name, "token", targets), inputs_of(name)
    found = logits(model, inputs)
    gates = last_route(model)
    with given_route(model, gates=gates.flatten(1, -3).mean(dim=1)):
        torch.testing.assert_close(logits(model, inputs), found, **EXACT)


class Joint(nn.Module):
    """Patches and a text beside them, each with a layer of its own."""

    def __init__(self, *, text_first=False):
        super().__init__()
        self.text_first = text_first
        self.context_embedder = nn.Linear(WIDTH, WIDTH)
        self.to_q = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states, encoder_hidden_states, encoder_attention_mask=None):
        text = self.context_embedder(encoder_hidden_states) if self.text_first else None
        hidden_states = self.to_q(hidden_states)
        return hidden_states, self.context_embedder(encoder_hidden_states) if text is None else text


@pytest.mark.parametrize("text_first", [False, True])
@torch.no_grad()
def test_a_text_of_as_many_tokens_as_patches_has_tokens_of_its_own(text_first):
    model = routed(Joint(text_first=text_first), ["to_q", "context_embedder"], "token")
    patches, text, order = hidden(seed=1), hidden(seed=2), [4, 0, 5, 2, 1, 3]
    for first, second in ((order, slice(None)), (slice(None), order)):
        y, z = model(patches[:, first], text[:, second])
        torch.testing.assert_close(y, model(patches, text)[0][:, first], **EXACT)
        torch.testing.assert_close(z, model(patches, text)[1][:, second], **EXACT)


@pytest.mark.parametrize("routing", ["batch", "sample"])
@torch.no_grad()
def test_the_padding_of_a_text_that_is_routed_does_not_count(routing):
    model = routed(Joint(text_first=True), ["to_q", "context_embedder"], routing)
    patches, text = hidden(seed=1), hidden(seed=2)
    padded, mask = torch.cat([text, 7 * text[:, :2]], dim=1), torch.tensor([[1] * 6 + [0] * 2]).expand(3, 8)
    wanted = model(patches, text)
    found = model(patches, encoder_hidden_states=padded, encoder_attention_mask=mask)
    torch.testing.assert_close((found[0], found[1][:, :6]), wanted, **EXACT)
    assert not torch.allclose(model(patches, padded)[0], wanted[0])


class Pooled(nn.Module):
    """Two layers that see no tokens, in regions that are computed again."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x, again, attention_mask):
        x = torch.tanh(self.first(x)).mean(dim=1)
        for layer in self.layers:
            x = torch.tanh(checkpoint(layer, x, use_reentrant=False) if again else layer(x))
        return x


def test_regions_that_are_computed_again_share_a_mean_of_token_gates():
    model = routed(Pooled(), ["first", "0", "1"], "token")
    found = []
    for again in (False, True):
        model.zero_grad()
        model(hidden(), again, attention_mask=torch.ones(3, 6)).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0]
    torch.testing.assert_close(found[1], found[0], **EXACT)


class OfABatch(nn.Module):
    """A model that gets all of its inputs in one mapping."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch):
        return self.linear(batch["x"])


@pytest.mark.parametrize("routing", ["batch", "sample"])
@torch.no_grad()
def test_masks_in_one_mapping_with_all_inputs(routing):
    model, x = routed(OfABatch(), ["linear"], routing), hidden()
    batch = {"attention_mask": torch.tensor([[1] * 4 + [0] * 2]).expand(3, 6), "x": x}
    wanted = model({"x": x[:, :4]})
    torch.testing.assert_close(model(batch)[:, :4], wanted, **EXACT)
    torch.testing.assert_close(model(batch=batch)[:, :4], wanted, **EXACT)
    assert not torch.allclose(model({"x": x})[:, :4], wanted)
