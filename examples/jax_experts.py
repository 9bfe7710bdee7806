"""Train routed experts in JAX: the same functions as for NumPy and torch, compiled and differentiated.

Run it: python examples/jax_experts.py
It takes seconds on a CPU, because its data is made up. Replace `load_data`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

import tucka

WIDTH, GROUPS, EXPERTS = 16, 2, 2
Parts = tuple[tucka.TuckerExperts, jax.Array]  # the experts and the centroids: what is trained


def load_data(count: int, *, seed: int) -> tuple[jax.Array, jax.Array]:
    """Make samples of two kinds, around +1 and -1; each kind's target is another linear map of the sample."""
    maps = jax.random.normal(jax.random.key(0), (2, WIDTH, WIDTH)) / WIDTH**0.5
    kind = jnp.arange(count) % 2
    x = jax.random.normal(jax.random.key(seed), (count, WIDTH)) + (1.0 - 2.0 * kind)[:, None]
    return x, jnp.einsum("nd,nde->ne", x, maps[kind])


def start(x: jax.Array, rank: int) -> tuple[Parts, jax.Array]:
    """Make experts whose update is zero, and centroids that split the data evenly; return their centre too."""
    experts = tucka.TuckerExperts(
        cores=jnp.zeros((GROUPS, EXPERTS, rank, rank)),
        expert_factor=jnp.eye(EXPERTS),
        basis=jnp.linalg.qr(jax.random.normal(jax.random.key(2), (WIDTH, rank)))[0],
    )
    centroids, center = tucka.balanced_centroids(x, groups=GROUPS, experts_per_group=EXPERTS, seed=0)
    return (experts, centroids), center


def predict(parts: Parts, center: jax.Array, x: jax.Array) -> jax.Array:
    """Route each sample and apply its experts: x + ((xU)Ḡ)Uᵀ."""
    experts, centroids = parts
    feature = tucka.routing_feature(x, routing="sample")
    logits = tucka.affinity_logits(feature, centroids, affinity="directional", center=center)
    return experts.apply(x, tucka.select_gates(logits))


def error(parts: Parts, center: jax.Array, x: jax.Array, target: jax.Array) -> jax.Array:
    """Return the mean squared error as a share of that of no adapter at all."""
    return ((predict(parts, center, x) - target) ** 2).mean() / ((x - target) ** 2).mean()


@partial(jax.jit, static_argnames="rate")
def step(
    parts: Parts, speed: Parts, center: jax.Array, x: jax.Array, target: jax.Array, *, rate: float
) -> tuple[Parts, Parts, jax.Array]:
    """Take one step of gradient descent with momentum; experts are a pytree, so they are updated as one."""
    value, gradient = jax.value_and_grad(error)(parts, center, x, target)
    speed = jax.tree.map(lambda old, slope: 0.9 * old + slope, speed, gradient)
    return jax.tree.map(lambda old, new: old - rate * new, parts, speed), speed, value


def main(steps: int = 300) -> tuple[float, float, float]:
    """Train on some samples; return the error before, after, and on samples that were not trained on."""
    x, target = load_data(512, seed=1)
    parts, center = start(x, rank=WIDTH)
    speed = jax.tree.map(jnp.zeros_like, parts)
    before = float(error(parts, center, x, target))
    for count in range(steps):
        parts, speed, value = step(parts, speed, center, x, target, rate=0.5)
        if count % 100 == 0:
            print(f"step {count:3}: error {float(value):.3f}")
    after, new = float(error(parts, center, x, target)), float(error(parts, center, *load_data(512, seed=3)))
    print(
        f"error {before:.3f} -> {after:.3f}; on new samples {new:.3f}; {parts[0].n_parameters:,} numbers in the experts"
    )
    return before, after, new


if __name__ == "__main__":
    main()
