"""The sweep over architectures."""

from support.torchvision_operators import declare_operators

declare_operators()
