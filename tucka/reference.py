"""The paper's equations as loops over NumPy numbers: unchecked, slow, obvious; all else is tested against them.

Modes count from 0.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]


def mode_product(tensor: Array, matrix: Array, mode: int) -> Array:
    """Compute Y[.., j, ..] = Σ_i X[.., i, ..] A[j, i], the definition below Eq. (3)."""
    shape = list(tensor.shape)
    shape[mode] = matrix.shape[0]
    result = np.zeros(shape)
    for index in np.ndindex(*shape):
        for i in range(matrix.shape[1]):
            source = (*index[:mode], i, *index[mode + 1 :])
            result[index] += tensor[source] * matrix[index[mode], i]
    return result


def expert(cores: Array, expert_factor: Array, basis: Array, group: int, index: int) -> Array:
    """Compute U (Σ_q C[j, q] G_i[q]) Uᵀ, a slice of Eq. (5), from G (k, p, r, r), C (t, p) and U (d, r)."""
    core = np.zeros(cores.shape[2:])
    for q in range(cores.shape[1]):
        core += expert_factor[index, q] * cores[group, q]
    return np.asarray(basis @ core @ basis.T)


def adapt(x: Array, gates: Array, cores: Array, expert_factor: Array, basis: Array, *, alpha: float = 1.0) -> Array:
    """Compute x (I + α Σ_ij γ_ij T_i[j]), Eq. (9) without W; the axes of x and gates align from the left."""
    lead, width = gates.ndim - 2, basis.shape[0]
    result = np.zeros(x.shape)
    for row in np.ndindex(*x.shape[:-1]):
        gate = gates[row[:lead]]
        update = np.zeros((width, width))
        for i in range(cores.shape[0]):
            for j in range(expert_factor.shape[0]):
                update += gate[i, j] * expert(cores, expert_factor, basis, i, j)
        result[row] = x[row] @ (np.eye(width) + alpha * update)
    return result


def soft_unit_columns(basis: Array) -> Array:
    """Divide each column u of a basis (d, r) by √(‖u‖² + 1/16)."""
    return np.stack([column / math.sqrt(sum(number**2 for number in column) + 1 / 16) for column in basis.T], axis=1)


def rotation(basis: Array, strength: float | None = None) -> Array:
    """Turn the i-th column of a basis (d, r) to the one half of r later, by Cayley's transform of c (v wᵀ − w vᵀ)."""
    rank, generator = basis.shape[1], np.zeros((basis.shape[0], basis.shape[0]))
    c = math.sqrt(8 / rank) if strength is None else strength
    for i in range(rank // 2):
        read, written = basis[:, i], basis[:, rank - rank // 2 + i]
        generator += c * (np.outer(read, written) - np.outer(written, read))
    identity = np.eye(len(generator))
    return np.linalg.solve(identity - generator / 2.0, identity + generator / 2.0)


def householder_gamma(vectors: Array) -> Array:
    """Compute Γ (r, r) of unit columns (d, r) by the recursion of Eq. (2)."""
    # The lower left block is 0, and not what the paper prints.
    gamma = np.array([[-2.0]])
    for r in range(1, vectors.shape[1]):
        bigger = np.zeros((r + 1, r + 1))
        bigger[:r, :r] = gamma
        bigger[:r, r] = -2.0 * gamma @ vectors[:, :r].T @ vectors[:, r]
        bigger[r, r] = -2.0
        gamma = bigger
    return gamma


def householder_product(vectors: Array) -> Array:
    """Compute Π_i (I − 2 u_i u_iᵀ), the left-hand side of Eq. (1), (d, r) -> (d, d)."""
    product = np.eye(vectors.shape[0])
    for i in range(vectors.shape[1]):
        product = product @ (np.eye(vectors.shape[0]) - 2.0 * np.outer(vectors[:, i], vectors[:, i]))
    return product


def routing_feature(hidden: Array, mask: Array | None, routing: str) -> Array:
    """Average (B, S, d) over unmasked tokens, then over samples that have any: h̄ above Eq. (6), (d,), (B, d) or all."""
    if routing == "token":
        return hidden
    batch, length, width = hidden.shape
    samples, present = np.zeros((batch, width)), []
    for b in range(batch):
        kept = [hidden[b, s] for s in range(length) if mask is None or mask[b, s] != 0]
        if kept:
            samples[b] = sum(kept) / len(kept)
            present.append(samples[b])
    if routing == "sample":
        return samples
    return np.asarray(sum(present) / len(present)) if present else np.zeros(width)


def affinity_logits(
    feature: Array, centroids: Array, affinity: str, center: Array | None = None, temperature: float = 1.0
) -> Array:
    """Compare one feature (d,) with every centroid (k, t, d): inside Eq. (6), and its variants."""
    if center is not None:
        feature = feature - center
    if affinity == "directional":
        feature = feature / (math.sqrt(float(feature @ feature)) or 1.0)
    logits = np.zeros(centroids.shape[:2])
    for i in range(logits.shape[0]):
        for j in range(logits.shape[1]):
            logits[i, j] = feature @ centroids[i, j]
        if affinity == "group_norm":
            logits[i] = logits[i] / (math.sqrt(float(logits[i] @ logits[i])) or 1.0)
    return logits / temperature


def select_gates(logits: Array, gate_norm: bool = True, bias: Array | None = None) -> Array:
    """Choose by the highest logit (k, t), with the bias (k,) added; gate by the sigmoids: Eq. (6), (7), (8)."""
    groups, experts = logits.shape
    best, chosen = -math.inf, 0
    for i in range(groups):
        for j in range(experts):
            compared = logits[i, j] + (0.0 if bias is None else bias[i])
            if compared > best:
                best, chosen = compared, i
    scores = [1.0 / (1.0 + math.exp(-logits[chosen, j])) for j in range(experts)]
    total = sum(scores) if gate_norm else 1.0
    gates = np.zeros((groups, experts))
    for j in range(experts):
        gates[chosen, j] = scores[j] / total
    return gates


def moved_bias(bias: Array, load: Array, rate: float) -> Array:
    """Move each group's bias by γ against its load: b_i + γ sign(mean load − load_i), arXiv:2408.15664."""
    mean = sum(load) / len(load)
    return np.array([b + rate * float(np.sign(mean - count)) for b, count in zip(bias, load, strict=True)])


def data_aware_centroids(features: Array, noise: Array) -> Array:
    """Compute [e, e + ε_1, .., e + ε_{M−1}] of Eq. (10) for features (n, d) and a noise (M − 1, d)."""
    center = sum(features) / len(features)
    return np.array([center, *(center + epsilon for epsilon in noise)])


def official_gates(hidden: Array, centroids: Array, groups: int) -> Array:
    """Route as the authors' code does: batch mean, token mean, logits over their group's norm, raw sigmoids."""
    # Padding counts. The centroids (k·t, d) stand group after group, as the authors' files hold them.
    tokens = sum(hidden[b] for b in range(hidden.shape[0])) / hidden.shape[0]
    feature = sum(tokens[s] for s in range(tokens.shape[0])) / tokens.shape[0]
    experts = centroids.shape[0] // groups
    logits = np.zeros((groups, experts))
    for i in range(groups):
        for j in range(experts):
            logits[i, j] = feature @ centroids[i * experts + j]
        logits[i] = logits[i] / math.sqrt(sum(float(logit) ** 2 for logit in logits[i]))
    return select_gates(logits, gate_norm=False)


def official_adapt(
    x: Array, gates: Array, cores: Array, expert_factor: Array, basis: Array, *, alpha: float = 1.0
) -> Array:
    """Adapt as the authors' code does: the chosen group's core, C and U each divided by its Frobenius norm."""
    chosen = int(np.argmax(np.abs(gates).sum(axis=1)))
    core = cores[chosen] / math.sqrt(float((cores[chosen] ** 2).sum()))
    factor = expert_factor / math.sqrt(float((expert_factor**2).sum()))
    unit = basis / math.sqrt(float((basis**2).sum()))
    return adapt(x, gates[chosen : chosen + 1], core[None], factor, unit, alpha=alpha)
