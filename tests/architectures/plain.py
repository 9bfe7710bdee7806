"""Small models of plain torch, as a user writes them, with inputs: they go through the same checks as the families."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from architectures.families import Draws, Inputs, mask_of

WIDTH = 16


class Perceptron(nn.Module):
    """Two layers on one vector for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 32)
        self.second = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x.mean(dim=1))))


class Convolutions(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.unflatten(-1, (4, 4)).transpose(1, 2)  # (B, 4, S, 4)
        return self.head(torch.relu(self.second(torch.relu(self.first(pixels)))).mean(dim=(2, 3)))


class Encoder(nn.Module):
    """Torch's own encoder between two layers, in either order of tokens and samples."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Linear(WIDTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        hidden = self.embed(x)
        hidden = hidden if self.batch_first else hidden.transpose(0, 1)
        hidden = self.encoder(hidden, src_key_padding_mask=src_key_padding_mask)
        return self.head(hidden if self.batch_first else hidden.transpose(0, 1))


class Translator(nn.Module):
    """Torch's own transformer, called with samples first or tokens first."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.transformer = nn.Transformer(WIDTH, 4, 2, 2, 32, dropout=0.0, batch_first=batch_first)

    def forward(self, x: Tensor, decoder_x: Tensor) -> Tensor:
        if self.batch_first:
            return self.transformer(x, decoder_x)
        return self.transformer(x.transpose(0, 1), decoder_x.transpose(0, 1)).transpose(0, 1)


class Mixture(nn.Module):
    """Tokens that are sent to one of three linear experts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x))
        scores = self.gate(hidden).softmax(dim=-1)
        chosen = scores.argmax(dim=-1)
        result = hidden.new_zeros(*hidden.shape[:-1], 8)
        for index, expert in enumerate(self.experts):
            here = chosen == index
            result[here] = expert(hidden[here]) * scores[here][:, index, None]
        return result


class Recurrent(nn.Module):
    """A recurrent network between two linear layers."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.memory = nn.LSTM(WIDTH, WIDTH, batch_first=batch_first)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        hidden = self.memory(hidden if self.batch_first else hidden.transpose(0, 1))[0]
        return self.head(hidden if self.batch_first else hidden.transpose(0, 1))


@dataclass(frozen=True)
class Plain:
    """One model of plain torch: what the checks ask of a family."""

    name: str
    make: Any
    targets: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    masks: str = ""
    decodes: bool = False
    rounds: bool = False  # torch computes the unadapted model by another kernel
    kind: str = "plain torch"
    generates: bool = False

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.make().eval()

    def inputs(self, batch: int, length: int, *, padding: bool = False, seed: int = 0) -> Inputs:
        draws = Draws(seed)
        found: Inputs = {"x": draws.normal(batch, length, WIDTH)}
        if self.decodes:
            found["decoder_x"] = draws.normal(batch, length + 2, WIDTH)
        if padding and self.masks:
            found[self.masks] = mask_of(batch, length) == 0
        return found

    @property
    def pads(self) -> bool:
        return bool(self.masks)


_FIRST = {"samples_first": True}
_KEYS = "src_key_padding_mask"

PLAIN = {
    row.name: row
    for row in (
        Plain("mlp", Perceptron, ("first", "second")),
        Plain("cnn", Convolutions, ("first", "second")),
        Plain("cnn-head", Convolutions, ("head",)),
        Plain("transformer-encoder", lambda: Encoder(batch_first=True), ("embed", "linear1", "linear2"), masks=_KEYS,
              rounds=True),
        Plain("transformer-encoder-tokens-first", lambda: Encoder(batch_first=False), ("linear1", "linear2"),
              masks=_KEYS),
        Plain("transformer-encoder-tokens-first-outside", lambda: Encoder(batch_first=False), ("embed", "linear1")),
        Plain("transformer-encoder-tokens-first-declared", lambda: Encoder(batch_first=False), ("embed", "linear1"),
              _FIRST, masks=_KEYS),
        Plain("transformer", lambda: Translator(batch_first=True), ("linear1", "linear2"), decodes=True),
        Plain("transformer-tokens-first", lambda: Translator(batch_first=False), ("linear1", "linear2"), decodes=True),
        Plain("attention", lambda: Encoder(batch_first=True), ("out_proj",)),
        Plain("mixture", Mixture, ("inner", "gate")),
        Plain("mixture-experts", Mixture, ("experts.0", "experts.1", "experts.2")),
        Plain("lstm", lambda: Recurrent(batch_first=True), ("embed", "head")),
        Plain("lstm-tokens-first", lambda: Recurrent(batch_first=False), ("embed", "head")),
        Plain("lstm-tokens-first-declared", lambda: Recurrent(batch_first=False), ("embed", "head"), _FIRST),
    )
}  # fmt: skip
