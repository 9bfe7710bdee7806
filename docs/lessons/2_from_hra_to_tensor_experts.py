r"""
2. From HRA to tensor experts, step by step
===========================================

In this lesson you build tensor experts from Householder reflection adaptation (HRA), and look at every tensor on the
way. HRA multiplies the inputs of a frozen layer by a product of reflections. TuckA starts from the thin form of this
product and puts many experts into it. The equation numbers are those of
`arXiv:2511.06859 <https://arxiv.org/abs/2511.06859>`_.
"""

import matplotlib.pyplot as plt
import numpy as np

import tucka

rng = np.random.default_rng(1)


def show(*named, width=8.5, height=2.6):
    """Draw matrices side by side, red above zero and blue below."""
    _figure, axes = plt.subplots(1, len(named), figsize=(width, height), squeeze=False)
    for ax, (title, matrix) in zip(axes[0], named, strict=True):
        most = np.abs(matrix).max() or 1.0
        ax.imshow(matrix, vmin=-most, vmax=most)
        ax.set(
            title=f"{title}\n{matrix.shape[0]} × {matrix.shape[1]}", xticks=[], yticks=[]
        )


# %%
# One reflection
# --------------
#
# A unit vector *u* defines a mirror, the plane at a right angle to *u*. :math:`H = I - 2uu^\top` maps every point to
# its mirror image. The map keeps lengths and angles, so it changes little of what a pretrained layer expects.

u = np.array([[np.cos(2.2)], [np.sin(2.2)]])
points = rng.normal(size=(12, 2)) * 0.4 + np.array([1.0, 0.6])
images = points @ tucka.householder_product(u)
assert np.allclose(images @ images.T, points @ points.T)  # lengths and angles

_, ax = plt.subplots(figsize=(4.4, 3.6))
ax.plot(*points.T, "o", label="points")
ax.plot(*images.T, "s", label="mirror images")
for before, after in zip(points, images, strict=True):
    ax.plot(*np.stack([before, after]).T, color="#9a9a9a", linewidth=0.6, zorder=0)
mirror = np.array([-u[1, 0], u[0, 0]])
ax.axline((0, 0), tuple(mirror), linestyle="--", color="#7b7b7b", label="mirror")
ax.set_aspect("equal")
legend = ax.legend()

# %%
# A product of reflections is thin
# --------------------------------
#
# HRA multiplies *r* reflections. The product is a d × d matrix, but it differs from the identity in *r* directions
# only, Eq. (1):
#
# .. math:: \prod_{i=1}^{r} (I - 2 u_i u_i^\top) = I + U \Gamma U^\top .
#
# *U* holds the vectors as columns. :math:`\Gamma` is a small upper triangular matrix that follows from *U*, Eq. (2):

d, r = 32, 6
vectors = rng.normal(size=(d, r))
vectors /= np.linalg.norm(vectors, axis=0)
product, gamma = tucka.householder_product(vectors), tucka.householder_gamma(vectors)
show(
    ("product − identity", product - np.eye(d)),
    ("U", vectors),
    ("Γ", gamma),
    ("Uᵀ", vectors.T),
)
assert np.allclose(product, np.eye(d) + vectors @ gamma @ vectors.T)

# %%
# So an activation passes through two thin products instead of one d × d product:

x = rng.normal(size=(5, d))
assert np.allclose(x @ product, x + ((x @ vectors) @ gamma) @ vectors.T)

# %%
# Free the middle
# ---------------
#
# In HRA, :math:`\Gamma` follows from *U* and is not free. Now let the middle be *any* r × r matrix *G*. The columns of
# *U* are then a basis of directions, and *G* determines how these directions are combined. This is one expert:

basis = np.linalg.qr(rng.normal(size=(d, r)))[0]
middle = rng.normal(size=(r, r))
show(("expert", basis @ middle @ basis.T), ("U", basis), ("G", middle), ("Uᵀ", basis.T))

# %%
# Give the middle a third mode
# ----------------------------
#
# Several experts could have one middle each. TuckA shares *p* middles among them, which are the slices of a **core**.
# Each of *t* experts is a combination of these slices, and the coefficients are the rows of the **expert factor** *C*.
# This is a Tucker tensor with one mode for the experts and two modes for the weights, Eq. (3) and (5):
#
# .. math::
#
#    \mathcal{T} = \mathcal{G} \times_0 C \times_1 U \times_2 U, \qquad
#    \mathcal{T}[j] = U \left( \sum_q C_{jq}\, \mathcal{G}[q] \right) U^\top .

t, p = 4, 2
core, expert_factor = rng.normal(size=(p, r, r)), rng.normal(size=(t, p))
tensor = tucka.multi_mode_product(core, [expert_factor, basis, basis])
show(
    *((f"slice {q} of the core", core[q]) for q in range(p)),
    ("C", expert_factor),
    ("U", basis),
)

# %%
# These parts make four experts:

assert tensor.shape == (4, d, d)
show(*((f"expert {j}", tensor[j]) for j in range(t)))

# %%
# Two small slices make four experts of 32 × 32. One more expert costs one more row of *C*, which is *p* numbers.
#
# Groups
# ------
#
# Experts that share a core are similar to some degree. TuckA therefore has *k* groups, and each group has its own core.
# All groups share *C* and *U*. The class :class:`tucka.TuckerExperts` holds these parts:

k = 3
experts = tucka.TuckerExperts(rng.normal(size=(k, p, r, r)), expert_factor, basis)
print(
    f"{k * t} experts of {d} × {d}: {k * t * d * d:,} entries from {experts.n_parameters} numbers"
)

figure, axes = plt.subplots(k, t, figsize=(7, 5.4))
for group in range(k):
    for index, expert in enumerate(experts.to_tensor(group)):
        axes[group, index].imshow(expert, vmin=-1.5, vmax=1.5)
        axes[group, index].set(xticks=[], yticks=[])
    axes[group, 0].set_ylabel(f"group {group}")
for index in range(t):
    axes[0, index].set_title(f"expert {index}")

# %%
# How similar are the groups? The cosine between two groups is their inner product divided by the product of their
# norms. The small parts give it too:

cosine = np.array(
    [
        [
            experts.inner(experts, a, b) / (experts.norm(a) * experts.norm(b))
            for b in range(k)
        ]
        for a in range(k)
    ]
)
print(cosine.round(2))
flat = np.stack([experts.to_tensor(group).ravel() for group in range(k)])
flat /= np.linalg.norm(flat, axis=1, keepdims=True)
assert np.allclose(cosine, flat @ flat.T)

# %%
# Mix first, then apply
# ---------------------
#
# A route gives every expert a *gate*, which is zero outside the chosen group. A mixture mixes the cores first. One r ×
# r matrix remains, so every activation passes through two thin products, however many experts there are, Eq. (9):
#
# .. math:: \bar G = \sum_{ijq} \gamma_{ij}\, C_{jq}\, \mathcal{G}_i[q], \qquad
#           x' = x + \alpha\, ((xU)\, \bar G)\, U^\top .

gates = np.zeros((k, t))
gates[1] = [0.1, 0.2, 0.3, 0.4]
mixed = experts.mix(gates)
formed = sum(gates[1, j] * experts.expert(1, j) for j in range(t))
show(("gates γ", gates), ("mixed core Ḡ", mixed), ("U Ḡ Uᵀ, never formed", formed))
assert np.allclose(experts.apply(x, gates, alpha=0.5), x + 0.5 * x @ formed)

# %%
# Back to HRA
# -----------
#
# HRA is the case of one group with one expert, whose core is :math:`\Gamma(U)`:

hra = tucka.householder_experts(vectors)
print(hra.cores.shape, hra.expert_factor)
assert np.allclose(hra.apply(x, np.ones((1, 1))), x @ product)

# %%
# HRA and TuckA differ in what they may learn. The map of HRA stays orthogonal during training, and the map of TuckA
# does not. But TuckA can start as *exactly* the identity, with cores of zero, and it can be several maps at once.
