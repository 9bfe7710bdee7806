"""Small trainings with the libraries that use tucka."""

from support.torchvision_operators import declare_operators

declare_operators()
