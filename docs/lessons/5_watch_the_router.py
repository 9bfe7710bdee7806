"""
5. Watch the router: collapse, balance, specialisation
======================================================

In this lesson you see on real sentences how a router collapses, what prevents this, and which group serves which
sentences. A router that sends every input to one group makes a mixture of experts into one expert.

The page needs the same downloads as lesson 3, and ``PYTHONPATH=.`` too.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

import tucka
from examples.data import fetch_sentences, read_domains, split_domains
from examples.sentence_classifier import Collator, encode, load_classifier
from tucka import simulate_routing
from tucka.plots import group_by_label, load_bars, routing_map

# %%
# What a router sees
# ------------------
#
# The router looks at the input of the first adapted layer, averaged over the tokens of a sentence. In an encoder this
# is the output of the embeddings, so the rest of the model does not have to run:

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
            tucka.routing_feature(hidden, mask=batch["attention_mask"], routing="sample")
        )
    return torch.cat(features).numpy()


train = features_of(split.train)
test = {domain: features_of(rows) for domain, rows in split.test.items()}
sentences = np.concatenate(list(test.values()))

# %%
# The paper routes batches: it makes one decision for the mean over all sentences of a batch. Here a batch is sixteen
# sentences, mixed from all domains:

batches = (
    np.random.default_rng(0).permutation(sentences).reshape(-1, 16, 384).mean(axis=1)
)
mean = train.mean(axis=0)
for name, features in (("sentences", sentences), ("batches", batches)):
    distance = np.linalg.norm(features - mean, axis=1).mean()
    print(
        f"{len(features):4} {name:9}: mean of length {np.linalg.norm(mean):.2f}, distance from it {distance:.2f}"
    )
assert np.linalg.norm(mean) > 3 * distance  # of the batches

# %%
# The part that all batches share is several times larger than the difference between batches. This is why the paper's
# rule fails here.
#
# Collapse
# --------
#
# The paper compares features with centroids by dot products, Eq. (6) and (7), and starts the centroids around the mean
# of the data, Eq. (10). In the product :math:`h \cdot e`, the part :math:`\mu \cdot e` is the same for all features.
# Where this part is large, it alone decides:

k, t = 4, 2


def starts(seed):
    """Return centroids, affinity and centre for each way to start a router."""
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


def groups_of(features, centroids, affinity, center):
    """Return the group of each feature."""
    logits = tucka.affinity_logits(features, centroids, affinity=affinity, center=center)
    return tucka.select_gates(logits).sum(axis=-1).argmax(axis=-1)


def load(features, start):
    """Count how many features each group gets."""
    return np.bincount(groups_of(features, *start), minlength=k)


_, axes = plt.subplots(1, 3, figsize=(9, 3.1), sharey=True)
for ax, (title, start) in zip(axes, starts(seed=0).items(), strict=True):
    counts = load(batches, start)
    load_bars(counts, ax=ax)
    ax.set(title=f"{title}\nentropy {tucka.load_entropy(counts):.2f}", ylim=(0, 1.15))

# %%
# The entropy is 1 where all groups are used alike, and 0 where one group takes everything. One seed could be chance, so
# we take twenty. With so few batches, an even random choice would reach about 0.99:

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
    if name.startswith("balanced"):
        assert min(by_batch, by_sentence) > 0.95
    else:
        assert by_batch < 0.5
        assert by_batch < by_sentence < 0.9

# %%
# Single sentences differ more from each other than batches do, so with dot products they spread better. But every group
# gets its part only when the shared part is subtracted.

# %%
# A collapse stays
# ----------------
#
# Theorem 1 of the paper says that training makes a collapse worse: the centroid of the chosen group moves towards the
# inputs that chose it, and so it is chosen again. :func:`tucka.simulate_routing` computes this for many
# runs at once, in the setting of the theorem. Here the features have the mean and the spread of the batches:

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
last = {label: trace.entropy(40).mean(axis=0)[-1] for label, trace in runs.items()}
print({label: round(float(entropy), 2) for label, entropy in last.items()})
assert (
    last["balanced, centred"] > 0.5 > max(last["kaiming, dot"], last["data-aware, dot"])
)

# %%
# Balance
# -------
#
# The default affinity subtracts a centre from the feature and looks only at the *direction* of the result. This removes
# what all sentences share, and also their scale. The centre and the centroids come from data, once, before training.
# :func:`tucka.peft.initialize_router`, or the :class:`~tucka.peft.RouterCallback` of the Trainer, does what we did by
# hand above. The next figure shows features and centroids in the two directions in which the features vary most:

balanced, affinity, center = starts(seed=0)["balanced, directional (default)"]
group = groups_of(sentences, balanced, affinity, center)
_, ax = plt.subplots(figsize=(5.6, 4.4))
axes = routing_map(sentences, balanced, center=center, ax=ax)

# %%
# Specialisation
# --------------
#
# Does a group serve a domain? Before any training some groups do more than others, because sentences of one domain are
# similar:

table, first = {}, 0
for domain, rows in test.items():
    table[domain] = np.bincount(group[first : first + len(rows)], minlength=k).tolist()
    first += len(rows)
shares = np.array(list(table.values())) / np.sum(list(table.values()), axis=1)[:, None]
print({domain: row.round(2).tolist() for domain, row in zip(table, shares, strict=True)})
assert (shares.max(axis=0) > 1.5 * shares.min(axis=0)).any()
_, ax = plt.subplots(figsize=(5, 3.2))
axes = group_by_label(table, ax=ax)

# %%
# While training
# --------------
#
# ``RouterCallback`` writes the entropy and the shares to the log of the Trainer, as lesson 3 shows. In your own code,
# ``expert_load(model, reset=True)`` of :mod:`!tucka.peft` counts the choices since the last reset, and
# ``last_route(model)`` returns the latest gates. A router that nobody has started starts itself in training, once
# it has seen enough batches; what it learns until then is lost, so start it before, as above. If a router still collapses,
# :doc:`/how-to/collapsed-router` helps to find the cause.
