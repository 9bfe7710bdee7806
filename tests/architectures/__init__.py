"""The sweep over architectures. What stands here lets torchvision, which timm needs, be imported beside any torch."""

from importlib.util import find_spec

import torch


def _declare_operators() -> None:
    """Declare the operators whose kernels are missing where torchvision was built for CUDA and torch for CPUs."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):  # of boxes, which no model of the sweep finds
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


if find_spec("torchvision") is not None:
    _declare_operators()
