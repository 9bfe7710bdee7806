"""
5. Watch the router: collapse, balance, specialisation
======================================================

A router that sends everything to one group makes a mixture of experts into one expert. This lesson shows how that comes
about, on real sentences; what keeps it from happening; and how to see which group serves what.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

import tucka
from tucka.core.collapse import simulate_routing
from tucka.demo.data import read_domains, split_domains
from tucka.demo.download import fetch_sentences
from tucka.demo.model import Collator, encode, load_classifier
from tucka.plots import expert_load, group_by_label, routing_map

# %%
# What a router sees
# ------------------
#
# The router looks at the input of the first adapted layer, averaged over the tokens of a sentence. In an encoder that
# is what its embeddings give out, so the rest of the model need not run:

split = split_domains(read_domains(fetch_sentences()), train=400, test=400)
classifier, tokenizer = load_classifier(seed=0)
collate = Collator(tokenizer.pad_token_id)


@torch.no_grad()
def features_of(sentences):
    """Return the routing feature of each sentence, shape (n, 384)."""
    features = []
    for first in range(0, len(sentences), 200):
        batch = collate(encode(tokenizer, sentences[first : first + 200], max_length=48))
        hidden = classifier.encoder.embeddings(input_ids=batch["input_ids"])
        features.append(
            tucka.routing_feature(
                hidden, mask=batch["attention_mask"], granularity="sample"
            )
        )
    return torch.cat(features).numpy()


train = features_of(split.train)
test = {domain: features_of(rows) for domain, rows in split.test.items()}
sentences = np.concatenate(list(test.values()))

# %%
# The paper routes batches: one decision for the mean over all sentences of a batch. Sixteen sentences, mixed from all
# domains, are one batch here:

batches = (
    np.random.default_rng(0).permutation(sentences).reshape(-1, 16, 384).mean(axis=1)
)
mean = train.mean(axis=0)
for name, features in (("sentences", sentences), ("batches", batches)):
    distance = np.linalg.norm(features - mean, axis=1).mean()
    print(
        f"{len(features):4} {name:9}: mean of length {np.linalg.norm(mean):.2f}, distance from it {distance:.2f}"
    )

# %%
# What two batches have in common is several times what tells them apart. That is what the paper's rule stumbles over.
#
# Collapse
# --------
#
# The paper compares features with centroids by dot products, Eq. (6) and (7), and proposes to start the centroids
# around the mean of the data, Eq. (10). Of the product :math:`h \cdot e`, the part :math:`\mu \cdot e` is the same for
# all features; where it is large, it decides alone:

k, t = 4, 2


def starts(seed):
    """Return centroids, affinity and centre of each way to start."""
    sizes = {"groups": k, "experts_per_group": t, "seed": seed}
    balanced, center = tucka.balanced_centroids(train, **sizes)
    return {
        "random, dot": (
            tucka.kaiming_centroids((k, t, 384), seed=seed, like=train),
            "dot",
            None,
        ),
        "data-aware, dot (the paper)": (
            tucka.data_aware_centroids(train, scale=0.1, **sizes),
            "dot",
            None,
        ),
        "balanced, directional (default)": (balanced, "directional", center),
    }


def groups_of(features, centroids, kind, center):
    """Say which group each feature goes to."""
    logits = tucka.affinity_logits(features, centroids, kind=kind, center=center)
    return tucka.select_gates(logits).sum(axis=-1).argmax(axis=-1)


def load(features, start):
    """Count how many features each group gets."""
    return np.bincount(groups_of(features, *start), minlength=k)


_, axes = plt.subplots(1, 3, figsize=(9, 3.1), sharey=True)
for ax, (title, start) in zip(axes, starts(seed=0).items(), strict=True):
    counts = load(batches, start)
    expert_load(counts, ax=ax)
    ax.set(title=f"{title}\nentropy {tucka.load_entropy(counts):.2f}", ylim=(0, 1.15))

# %%
# Entropy is 1 where all groups are used alike and 0 where one takes all. One seed could be luck, so here are twenty. An
# even chance would reach about 0.99 with so few batches:

entropies = {}
for seed in range(20):
    for name, start in starts(seed).items():
        rows = [
            tucka.load_entropy(load(features, start)) for features in (batches, sentences)
        ]
        entropies.setdefault(name, []).append(rows)
print(f"{'':32} batches  sentences")
for name, rows in entropies.items():
    by_batch, by_sentence = np.mean(rows, axis=0)
    print(f"{name:32} {by_batch:7.2f}  {by_sentence:9.2f}")

# %%
# Single sentences differ more from each other, so with dot products they spread better than batches do; but only after
# what they share is taken away does every group get its part.

# %%
# Once collapsed, it stays
# ------------------------
#
# Theorem 1 of the paper says that training makes it worse: the chosen group's centroid moves towards what it was chosen
# for, and so it is chosen again. :func:`tucka.core.collapse.simulate_routing` follows that for many runs at once, in
# the theorem's own setting. Here the features have the mean and the spread of the batches:

setting = {
    "groups": k,
    "seeds": 20,
    "steps": 400,
    "mean": mean,
    "covariance": train.var(axis=0) / 16,
}
runs = {
    "kaiming, dot": simulate_routing("kaiming", **setting),
    "data-aware, dot": simulate_routing("dai", scale=0.1, **setting),
    "balanced, centred": simulate_routing("balanced", affinity="centered", **setting),
}
_, ax = plt.subplots(figsize=(6, 3.4))
for (label, trace), style in zip(runs.items(), ("-", "--", "-."), strict=True):
    ax.plot(np.arange(0, 400, 40), trace.entropy(40).mean(axis=0), style, label=label)
ax.set(
    xlabel="step",
    ylabel="entropy of 40 choices",
    ylim=(0, 1.05),
    title="Twenty runs of Theorem 1's dynamics",
)
legend = ax.legend(frameon=False)

# %%
# Balance
# -------
#
# The default affinity looks at the *direction* of the feature after a centre was taken away: what all sentences share
# is gone, and so is their scale. Centre and centroids come from data, once, before training:
# :func:`tucka.peft.initialize_router`, or the :class:`~tucka.peft.RouterCallback` of the Trainer, do what was done by
# hand above. A picture of it, features and centroids in the two directions in which they vary most:

balanced, kind, center = starts(seed=0)["balanced, directional (default)"]
group = groups_of(sentences, balanced, kind, center)
_, ax = plt.subplots(figsize=(5.6, 4.4))
axes = routing_map(sentences, balanced, center=center, ax=ax)

# %%
# Specialisation
# --------------
#
# Does a group serve a domain? Before any training, some do more than others, for sentences of one domain are alike:

table, first = {}, 0
for domain, rows in test.items():
    table[domain] = np.bincount(group[first : first + len(rows)], minlength=k).tolist()
    first += len(rows)
_, ax = plt.subplots(figsize=(5, 3.2))
axes = group_by_label(table, ax=ax)

# %%
# While training
# --------------
#
# ``RouterCallback`` writes the entropy and the shares to the Trainer's log, as lesson 3 shows. In code of your own,
# ``expert_load(model, reset=True)`` of :mod:`!tucka.peft` counts the choices since it was last asked, and
# ``last_route(model)`` returns the latest gates. If a router collapses all the same,
# :doc:`/how-to/collapsed-router` goes through the causes.
