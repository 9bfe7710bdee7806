"""Small base models, one for each kind of layer that adapters sit on, with inputs. Imports no tucka."""

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel


def bert():
    """A classifier on linear layers, its targets and its inputs; dropout 0."""
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    ids = torch.arange(12).reshape(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    return BertForSequenceClassification(config), ["query", "dense"], {"input_ids": ids, "attention_mask": mask}


def gpt2():
    """A causal model on Conv1D layers."""
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.2)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config), ["c_attn", "c_fc"], {"input_ids": torch.arange(12).reshape(2, 6)}


class Convolutions(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self, *layers, size):
        super().__init__()
        self.first, self.second = layers
        self.size = size
        self.last = nn.Linear(self.second.out_channels, 3)

    def forward(self, x):
        hidden = self.second(torch.tanh(self.first(x)))
        return self.last(torch.tanh(hidden.flatten(2).mean(dim=-1)))


def convolutions(first, second, size):
    """A convolutional model, its targets and its inputs."""
    model = Convolutions(first, second, size=size)
    x = torch.sin(torch.arange(2 * first.in_channels * int(torch.Size(size).numel())).float() * 0.7)
    return model, ["first", "second", "last"], {"x": x.reshape(2, first.in_channels, *size)}


def conv2d_square():
    return convolutions(nn.Conv2d(4, 24, 3, stride=2, padding=1), nn.Conv2d(24, 20, 1), (7, 6))


def conv2d_rectangular():
    return convolutions(nn.Conv2d(4, 16, (1, 3), padding=(0, 1)), nn.Conv2d(16, 18, (3, 1), padding="same"), (5, 6))


def conv1d():
    return convolutions(nn.Conv1d(4, 16, 3), nn.Conv1d(16, 12, 2, stride=2), (9,))


def conv3d():
    return convolutions(nn.Conv3d(3, 20, (1, 2, 2)), nn.Conv3d(20, 24, 1), (3, 4, 4))


def conv2d_dilated():
    layers = (
        nn.Conv2d(4, 8, 3, padding=2, dilation=2, padding_mode="circular"),
        nn.Conv2d(8, 6, (2, 3), padding_mode="reflect", padding=1),
    )
    return convolutions(*layers, (6, 6))


def transposed():
    return convolutions(nn.ConvTranspose2d(4, 6, 3, stride=2), nn.ConvTranspose2d(6, 5, 2), (4, 5))


EXPORTABLE = {make.__name__: make for make in (bert, gpt2, conv2d_square, conv2d_rectangular, conv1d, conv3d)}
BASES = {**EXPORTABLE, conv2d_dilated.__name__: conv2d_dilated, transposed.__name__: transposed}


def make_base(kind, *, dtype=torch.float32, seed=0):
    """Make one base model of a kind, in evaluation mode, with its targets and inputs."""
    torch.manual_seed(seed)
    model, targets, inputs = BASES[kind]()
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    return model.to(dtype).eval(), targets, inputs


def run(model, inputs):
    """Return a model's output as one tensor."""
    output = model(**inputs)
    return output if isinstance(output, torch.Tensor) else output.logits
