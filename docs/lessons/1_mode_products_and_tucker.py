"""
1. Mode products and Tucker in ten minutes
==========================================

In this lesson you learn the two ideas of tensor algebra that tensor experts need. The *mode product* multiplies a
tensor by a matrix. The *Tucker form* is a small tensor with a mode product along each of its modes. The lesson assumes
no tensor algebra and uses NumPy. At the end the same lines run on PyTorch and JAX arrays, with gradients.

A tensor is an array with any number of axes. Its axes are called modes. Here they count from 0, as in NumPy; the
literature, and the paper behind this library, counts them from 1.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cbook import get_sample_data

import tucka

rng = np.random.default_rng(0)
tensor = rng.normal(size=(3, 4, 5))

# %%
# The mode product
# ----------------
#
# A matrix times a vector mixes the entries of the vector. The product of a tensor with a matrix along mode *n* does
# this to every vector that runs along mode *n*:
#
# .. math::
#
#    \mathcal{Y} = \mathcal{X} \times_n A, \qquad
#    \mathcal{Y}_{\ldots j \ldots} = \sum_{i_n} \mathcal{X}_{\ldots i_n \ldots} A_{j i_n} .
#
# Mode *n* gets as many entries as *A* has rows. The other modes keep their sizes:

matrix = rng.normal(size=(7, 4))
product = tucka.mode_product(tensor, matrix, mode=1)
assert product.shape == (3, 7, 5)
product.shape

# %%
# One line of einsum computes the same. It shows which letter is summed:

assert np.allclose(product, np.einsum("abc,jb->ajc", tensor, matrix))

# %%
# For a matrix, the product along mode 0 multiplies from the left, and the product along mode 1 multiplies from the
# right by the transpose. So :math:`\times_0 A \times_1 B` of a matrix *X* is :math:`A X B^\top`, the form of a singular
# value decomposition:

x, left, right = rng.normal(size=(4, 5)), rng.normal(size=(2, 4)), rng.normal(size=(3, 5))
assert np.allclose(tucka.multi_mode_product(x, [left, right]), left @ x @ right.T)

# %%
# There are two rules. First, products along *different* modes commute, so their order does not matter:

along_0, along_2 = rng.normal(size=(6, 3)), rng.normal(size=(2, 5))
one_way = tucka.mode_product(tucka.mode_product(tensor, along_0, mode=0), along_2, mode=2)
other_way = tucka.mode_product(
    tucka.mode_product(tensor, along_2, mode=2), along_0, mode=0
)
assert np.allclose(one_way, other_way)

# %%
# Second, products along the *same* mode multiply their matrices, and the second matrix stands on the left:

first, second = rng.normal(size=(6, 4)), rng.normal(size=(2, 6))
one_by_one = tucka.mode_product(tucka.mode_product(tensor, first, mode=1), second, mode=1)
assert np.allclose(one_by_one, tucka.mode_product(tensor, second @ first, mode=1))

# %%
# A size that does not fit raises an error before anything is computed:

refusal = ""
try:
    tucka.mode_product(tensor, matrix, mode=0)
except tucka.ShapeError as error:
    refusal = str(error)
print(refusal)
assert "expected" in refusal

# %%
# The Tucker form
# ---------------
#
# Take a small *core* tensor and multiply it along every mode by a tall matrix, a *factor*. The result is large, but the
# small parts determine it completely:

core = rng.normal(size=(2, 3, 3))
factors = [
    rng.normal(size=(rows, columns)) for rows, columns in ((10, 2), (50, 3), (60, 3))
]
large = tucka.multi_mode_product(core, factors)
held = core.size + sum(factor.size for factor in factors)
print(f"{large.shape}: {large.size:,} entries from {held} numbers")

# %%
# The sizes of the core, (2, 3, 3), are the *multilinear rank*: the number of directions along each mode.
#
# The Tucker form can also approximate a given tensor. A colour photograph is a tensor of height, width and three
# colours. TensorLy, on which this library builds, finds the factors:

from tensorly.decomposition import tucker

with get_sample_data("grace_hopper.jpg") as file:
    photograph = plt.imread(file)[::2, ::2] / 255.0

figure, axes = plt.subplots(1, 3, figsize=(8.5, 3.9))
axes[0].imshow(photograph)
axes[0].set_title(f"{photograph.size:,} numbers")
for ax, rank in zip(axes[1:], (40, 12), strict=True):
    core, factors = tucker(photograph, rank=(rank, rank, 3))
    squeezed = tucka.multi_mode_product(core, factors)
    held = core.size + sum(factor.size for factor in factors)
    error = np.linalg.norm(squeezed - photograph) / np.linalg.norm(photograph)
    ax.imshow(squeezed.clip(0, 1))
    ax.set_title(f"rank ({rank}, {rank}, 3): {held:,}\nerror {error:.0%}")
    assert held < photograph.size / 4
    assert error < 0.3
for ax in axes:
    ax.axis("off")

# %%
# The next figure shows the core. The factors are orthonormal, so the core has the whole norm of the approximation. Most
# of this norm is in one corner: the first directions of one mode combine with the first directions of the others.

assert np.isclose(np.linalg.norm(core), np.linalg.norm(squeezed))
assert np.linalg.norm(core[:3, :3]) > 0.9 * np.linalg.norm(core)
figure, axes = plt.subplots(1, 3, figsize=(8.5, 2.9))
for colour, ax in enumerate(axes):
    picture = ax.imshow(np.log10(np.abs(core[..., colour]) + 1e-3), cmap="Blues")
    ax.set(title=f"core, slice {colour} of mode 2", xticks=[], yticks=[])
_ = figure.colorbar(picture, ax=axes, label="log10 |entry|")

# %%
# Nothing large is formed
# -----------------------
#
# In a neural network, the Tucker form is useful because you can *apply* a matrix without forming it. If
# :math:`T = U G U^\top` with *U* of 1000 × 4, then :math:`xT = ((xU)G)U^\top`, which is two thin products:

basis, small = rng.normal(size=(1000, 4)), rng.normal(size=(4, 4))
rows = rng.normal(size=(8, 1000))
formed = tucka.multi_mode_product(small, [basis, basis])  # 1000 × 1000
assert np.allclose(rows @ formed, ((rows @ basis) @ small) @ basis.T)
print(
    f"multiply-adds for each row: {1000 * 1000:,} formed, {2 * 1000 * 4 + 4 * 4:,} thin"
)

# %%
# The same lines in PyTorch
# -------------------------
#
# The functions find the library from the arrays, so you do not select a backend. The results keep the library, dtype
# and device of the arrays, and gradients flow through them:

import torch

torch_core = torch.randn(2, 3, 3, requires_grad=True)
torch_factors = [
    torch.randn(rows, columns) for rows, columns in ((10, 2), (50, 3), (60, 3))
]
tensor = tucka.multi_mode_product(torch_core, torch_factors)
tensor.pow(2).sum().backward()
print(tensor.shape, tensor.dtype, torch_core.grad.shape)
assert isinstance(tensor, torch.Tensor)
assert torch_core.grad.shape == torch_core.shape

# %%
# And in JAX
# ----------
#
# The same lines run in JAX and under its transformations: ``grad`` differentiates the function, and ``jit`` compiles
# it.

import jax
import jax.numpy as jnp

jax_core = jnp.asarray(torch_core.detach().numpy())
jax_factors = [jnp.asarray(factor.numpy()) for factor in torch_factors]


def energy(core):
    """Return the sum of all squared entries."""
    return (tucka.multi_mode_product(core, jax_factors) ** 2).sum()


gradient = jax.jit(jax.grad(energy))(jax_core)
assert isinstance(gradient, jax.Array)
assert np.allclose(gradient, torch_core.grad.numpy(), rtol=1e-4)

# %%
# The next lesson turns an adapter that is a single matrix into a tensor of many experts.
