"""What lets torchvision, which timm needs, be imported beside any torch; without it not even peft can be."""

from importlib.util import find_spec

import torch

__all__ = ["declare_operators"]


def declare_operators():
    """Declare the operators whose kernels are missing where torchvision was built for CUDA and torch for CPUs."""
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):  # of boxes, which no model of the tests finds
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
