"""How evenly routers use their groups at the start, on features of real models that they have not seen.

python -m benchmarks.routing.balance run      # writes benchmarks/results/routing-balance-start.json
python -m benchmarks.routing.balance report   # a table and a figure from it

Each seed draws the samples that the router starts from (32 batches of 16) and its random numbers; all other samples
are routed, one by one or in batches of 16 that mix the labels. The ceiling is what n choices at random would give:
1 - (k - 1) / (2 n ln k).
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.cluster.vq import kmeans2
from tqdm import tqdm

import tucka
from benchmarks.provenance import provenance
from benchmarks.routing.balance_report import write_report
from benchmarks.routing.features import SOURCES, Features, load_features
from tucka.core.centroids import features_like_batches
from tucka.reference import moved_bias

RESULT = Path(__file__).parents[1] / "results" / "routing-balance-start.json"
GROUPS, EXPERTS, SEEDS, BATCH, BATCHES = (2, 4, 8), 2, 20, 16, 32
UPDATES, RATE = 400, 0.001

Matrix = np.ndarray[Any, Any]
# Takes the features to start from, k and the seed; gives centroids (k, t, d), the centre and the bias.
Start = Callable[[Matrix, int, int], tuple[Matrix, Matrix | None, Matrix | None]]


def kaiming(seen: Matrix, k: int, seed: int) -> tuple[Matrix, None, None]:
    return tucka.kaiming_centroids((k, EXPERTS, seen.shape[1]), seed=seed), None, None


def dai(seen: Matrix, k: int, seed: int) -> tuple[Matrix, None, None]:
    """Make the paper's start, with the authors' a = 10."""
    made = tucka.data_aware_centroids(seen, groups=k, experts_per_group=EXPERTS, scale=10.0, seed=seed)
    return made, None, None


def centred_kaiming(seen: Matrix, k: int, seed: int) -> tuple[Matrix, Matrix, None]:
    return kaiming(seen, k, seed)[0], seen.mean(axis=0), None


def centred_dai(seen: Matrix, k: int, seed: int) -> tuple[Matrix, Matrix, None]:
    center = seen.mean(axis=0)
    return dai(seen - center, k, seed)[0], center, None


def balanced(seen: Matrix, k: int, seed: int) -> tuple[Matrix, Matrix, None]:
    return *tucka.balanced_centroids(seen, groups=k, experts_per_group=EXPERTS, seed=seed), None


def clusters(seen: Matrix, k: int, seed: int) -> tuple[Matrix, Matrix, None]:
    """Take the directions of k-means clusters in the whitened space of the leading axes."""
    center, corners = seen.mean(axis=0), k * EXPERTS
    _, singular, rows = np.linalg.svd(seen - center, full_matrices=False)
    axes = rows[: corners - 1] / (singular[: corners - 1, None] / math.sqrt(len(seen)))
    points = (seen - center) @ axes.T
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a cluster may be empty
        ends, _ = kmeans2(points, corners, minit="++", rng=seed)
    ends /= np.linalg.norm(ends, axis=1, keepdims=True)
    order = np.random.default_rng(seed).permutation(corners)
    return (ends[order] @ axes).reshape(k, EXPERTS, -1), center, None


def with_bias(start: Start) -> Start:
    """Let the bias on the choice move against the load, over batches of what the router starts from."""

    def started(seen: Matrix, k: int, seed: int) -> tuple[Matrix, Matrix | None, Matrix]:
        centroids, center, _ = start(seen, k, seed)
        rng, bias = np.random.default_rng(seed), np.zeros(k)
        best = logits_of(seen, centroids, center).max(axis=2)
        for _ in range(UPDATES):
            rows = best[rng.choice(len(seen), 4 * BATCH, replace=False)]
            bias = moved_bias(bias, np.bincount((rows + bias).argmax(axis=1), minlength=k), RATE)
        return centroids, center, bias

    return started


ROUTERS: dict[str, tuple[str, Start]] = {
    "Kaiming, dot": ("dot", kaiming),
    "DAI (a = 10), dot: the paper's": ("dot", dai),
    "DAI (a = 10), group_norm: the authors' code": ("group_norm", dai),
    f"DAI (a = 10), dot, bias of γ = {RATE:g}, {UPDATES} updates": ("dot", with_bias(dai)),
    f"Kaiming, dot, bias of γ = {RATE:g}, {UPDATES} updates": ("dot", with_bias(kaiming)),
    "Kaiming, centred": ("centered", centred_kaiming),
    "DAI (a = 10), centred": ("centered", centred_dai),
    "Kaiming, cosine of centred": ("cosine", centred_kaiming),
    "DAI (a = 10), distance": ("distance", dai),
    "DAI (a = 10), whitened": ("whitened", dai),
    "k-means, directional": ("directional", clusters),
    "balanced, centred": ("centered", balanced),
    "balanced, directional: the default": ("directional", balanced),
}


def logits_of(features: Matrix, centroids: Matrix, center: Matrix | None, affinity: str | None = None) -> Matrix:
    affinity = affinity or ("dot" if center is None else "centered")
    return tucka.affinity_logits(features, centroids, affinity=affinity, center=center)


def choices(affinity: str, features: Matrix, seen: Matrix, made: tuple[Matrix, Matrix | None, Matrix | None]) -> Matrix:
    """Return the group of each feature; some affinities are not in the library."""
    centroids, center, bias = made
    if affinity == "cosine":
        affinity, centroids = "directional", centroids / np.linalg.norm(centroids, axis=-1, keepdims=True)
    elif affinity == "whitened":  # the product in the whitened space, of features and centroids without the centre
        center = seen.mean(axis=0)
        _, singular, rows = np.linalg.svd(seen - center, full_matrices=False)
        known = singular > 0.05 * singular[0]
        back = (rows[known] / singular[known, None] ** 2) * len(seen)
        centroids, affinity = (centroids - center) @ rows[known].T @ back, "centered"
    if affinity == "distance":
        logits = features @ centroids.reshape(-1, features.shape[1]).T - 0.5 * (centroids**2).sum(axis=-1).ravel()
        logits = logits.reshape(len(features), *centroids.shape[:2])
    else:
        logits = logits_of(features, centroids, center, affinity)
    best = logits.max(axis=2)
    return (best if bias is None else best + bias).argmax(axis=1)


def measure(features: Features, k: int, seed: int) -> dict[str, dict[str, list[int]]]:
    """Return for each router the load of its groups, by routing."""
    vectors = features.vectors.astype(np.float64)[np.random.default_rng(seed).permutation(len(features.vectors))]
    seen, unseen = vectors[: BATCH * BATCHES], vectors[BATCH * BATCHES :]
    means = unseen[: len(unseen) // BATCH * BATCH].reshape(-1, BATCH, unseen.shape[1]).mean(axis=1)
    batches = seen.reshape(BATCHES, BATCH, -1)
    middles = batches.mean(axis=1)
    # The features from which the library starts a router of batches on the same data.
    alike = features_like_batches(middles, (batches - middles[:, None]).reshape(seen.shape), batch_size=BATCH)
    loads: dict[str, dict[str, list[int]]] = {}
    for name, (affinity, start) in ROUTERS.items():
        loads[name] = {
            routing: np.bincount(choices(affinity, routed, given, start(given, k, seed)), minlength=k).tolist()
            for routing, routed, given in (("sample", unseen, seen), ("batch", means, alike))
        }
    return loads


def run(seeds: int) -> None:
    found: dict[tuple[str, int, str, str], list[list[int]]] = {}
    for source in SOURCES:
        features = load_features(source)
        for k in GROUPS:
            for seed in tqdm(range(seeds), desc=f"{source}, k = {k}"):
                for router, loads in measure(features, k, seed).items():
                    for routing, load in loads.items():
                        found.setdefault((source, k, router, routing), []).append(load)
    names = ("source", "k", "router", "routing")
    rows = [{**dict(zip(names, place, strict=True)), "loads": loads} for place, loads in found.items()]
    made_with = provenance(("numpy", "scipy", "torch", "transformers"))
    about = {"seeds": seeds, "batch": BATCH, "batches": BATCHES, **made_with}
    RESULT.write_text(json.dumps({**about, "rows": rows}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["run", "report"])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    if options.action == "run":
        run(options.seeds)
    write_report(RESULT)


if __name__ == "__main__":
    main()
