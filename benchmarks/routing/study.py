"""Train adapters on four domains of sentences and see whether routing helps, and whether it stays balanced.

python -m benchmarks.routing.study run pays --seeds 5      # k = 1 against 2, 4, 8 at equal parameters
python -m benchmarks.routing.study run balance --seeds 2   # the load before and after training, by router
python -m benchmarks.routing.study run starts --seeds 5    # the same for the starts of the paper's Figure 4
python -m benchmarks.routing.study report pays balance starts

``run`` appends a line to ``benchmarks/results/routing-SET.jsonl`` for each finished training and skips those that are
there, so it can be stopped and called again. ``report`` makes tables and figures from these files, and only from them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from torch import Tensor, nn

from benchmarks.provenance import provenance
from benchmarks.routing.study_report import write_report
from examples.data import DOMAINS, fetch_sentences, read_domains, split_domains
from examples.sentence_classifier import Collator, Item, LengthBatches, SentenceClassifier, encode, load_classifier
from tucka.backends.torch.routing.router import Router
from tucka.backends.torch.routing.scope import scope_of
from tucka.core.balance import load_entropy
from tucka.core.counts import count_parameters
from tucka.peft import TuckAConfig, adapted_modules, balance_router, expert_load, initialize_router

RESULTS = Path(__file__).parents[1] / "results"
SETS = ("pays", "balance", "starts")
TARGETS = ["query", "value", "dense"]
MAX_LENGTH = 64
EPOCHS, BATCH, RATE = 2, 32, 2e-3
INITIAL_BATCHES = 16
BATCH_DEALS = 8
# Each training may have as many parameters, without the head, as k = 4 with rank 8.
BUDGET_K, BUDGET_R = 4, 8


@dataclass(frozen=True)
class Setting:
    """One adapter, how it is trained and on how many sentences of each domain; a batch is of all domains or of one."""

    k: int
    routing: str
    batches: str = "mixed"
    affinity: str = "directional"
    router_init: str | None = None
    balance_rate: float = 0.0
    scale: float | None = None
    train: int = 300
    test: int = 500

    def key(self, seed: int) -> str:
        """Name a training of this setting."""
        return json.dumps({**asdict(self), "seed": seed}, sort_keys=True)


def settings(name: str) -> list[Setting]:
    """List what a set of trainings compares."""
    if name == "pays":
        # Fewer sentences than for the balance, because there are many trainings, and each one is tested.
        sizes = {"train": 200, "test": 400}
        singles = [Setting(1, "batch", batches, **sizes) for batches in ("mixed", "one domain")]
        ways = [("batch", "mixed"), ("batch", "one domain"), ("sample", "mixed"), ("token", "mixed")]
        return singles + [Setting(k, *way, **sizes) for k in (2, 4, 8) for way in ways]
    if name == "starts":  # one number of groups and more seeds: the paper's start, random centroids, and the default
        starts: list[dict[str, Any]] = [
            {"affinity": "dot", "router_init": "kaiming"},
            {"affinity": "dot", "router_init": "dai", "scale": 10.0},
            {},
        ]
        return [Setting(4, routing, **start) for start in starts for routing in ("batch", "sample")]
    routers: list[dict[str, Any]] = [
        {},
        {"affinity": "dot", "router_init": "dai", "scale": 10.0},
        {"affinity": "dot", "router_init": "dai", "scale": 10.0, "balance_rate": 0.001},
        {"balance_rate": 0.001},
    ]
    return [Setting(k, routing, **router) for router in routers for routing in ("batch", "sample") for k in (2, 4, 8)]


@dataclass(frozen=True)
class Data:
    """Sentences as tokens, each with its domain's position in `DOMAINS` under ``domain``."""

    train: list[Item]
    test: list[Item]


@cache
def tokens() -> Any:
    return load_classifier(seed=0)[1]


@cache
def data(train: int, test: int) -> Data:
    tokenizer = tokens()
    split = split_domains(read_domains(fetch_sentences()), train=train, test=test)
    tested = [sentence for sentences in split.test.values() for sentence in sentences]
    made = []
    for sentences in (split.train, tested):
        items = encode(tokenizer, sentences, max_length=MAX_LENGTH)
        places = [list(DOMAINS).index(sentence.domain) for sentence in sentences]
        made.append([{**item, "domain": place} for item, place in zip(items, places, strict=True)])
    return Data(made[0], made[1])


def batches_of(items: Sequence[Item], size: int, kind: str) -> Iterator[list[Item]]:
    """Yield batches of similar lengths in a random order: of all domains together, or each of one domain."""
    domains = [range(len(DOMAINS))] if kind == "mixed" else [[place] for place in range(len(DOMAINS))]
    made = []
    for places in domains:
        chosen = [item for item in items if item["domain"] in places]
        lengths = [len(item["input_ids"]) for item in chosen]
        made += [[chosen[row] for row in rows] for rows in LengthBatches(lengths, size)]
    yield from (made[row] for row in torch.randperm(len(made)).tolist())


def rank_of(k: int) -> int:
    """Find the rank at which k groups have closest to the number of parameters that each training may have."""
    layers = [(384, 384), (384, 384), (384, 384), (384, 1536), (1536, 384)] * 6
    sizes = {"t": 2, "p": 2}
    budget = count_parameters("tucka", layers, r=BUDGET_R, k=BUDGET_K, **sizes)
    return min(range(1, 33), key=lambda r: abs(count_parameters("tucka", layers, r=r, k=k, **sizes) - budget))


def adapt(setting: Setting, seed: int) -> nn.Module:
    classifier, _ = load_classifier(seed=seed)
    config = TuckAConfig(
        r=rank_of(setting.k),
        k=setting.k,
        routing=setting.routing,
        affinity=setting.affinity,
        router_init=setting.router_init,
        balance_rate=setting.balance_rate,
        router_seed=seed,
        target_modules=list(TARGETS),
        modules_to_save=["head"],
    )
    torch.manual_seed(seed)
    return get_peft_model(classifier, config)


def inputs(items: Sequence[Item]) -> dict[str, Tensor]:
    return Collator(tokens().pad_token_id)(items)


def train(model: nn.Module, setting: Setting) -> None:
    """Train on the CPU with AdamW; the learning rate warms up shortly and then falls linearly to zero."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    plan = [
        rows
        for _ in range(EPOCHS)
        for rows in batches_of(data(setting.train, setting.test).train, BATCH, setting.batches)
    ]
    warm = max(1, len(plan) // 16)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (len(plan) - step) / (len(plan) - warm))
    )
    model.train()
    for rows in plan:
        optimizer.zero_grad()
        model(**inputs(rows)).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if setting.balance_rate:
            balance_router(model, expert_load(model, reset=True))
    model.eval()


def groups_of(gates: Tensor, mask: Tensor) -> list[Tensor]:
    """Return, for each sample, the groups that were chosen for it: one, or one for each token."""
    chosen = gates.sum(dim=-1).argmax(dim=-1)
    if chosen.ndim == 2:
        return [row[kept] for row, kept in zip(chosen, mask.bool(), strict=True)]
    return list(chosen.expand(len(mask))[:, None])


@torch.no_grad()
def routes(model: nn.Module, setting: Setting) -> dict[str, Any]:
    """Route the test sentences with the router alone: the encoder below it is frozen."""
    router = scope_of(model).router("default")
    assert isinstance(router, Router)
    base: SentenceClassifier = model.get_base_model()
    table = np.zeros((len(DOMAINS), setting.k), dtype=int)
    decisions = np.zeros(setting.k, dtype=int)
    torch.manual_seed(0)
    # With batch routing a batch is one decision. To get enough decisions, the sentences are put into batches again.
    deals = BATCH_DEALS if setting.routing == "batch" else 1
    dealt = (
        rows
        for _ in range(deals)
        for rows in batches_of(data(setting.train, setting.test).test, BATCH, setting.batches)
    )
    for rows in dealt:
        batch = inputs(rows)
        gates = router(base.encoder.embeddings(batch["input_ids"]), batch["attention_mask"])
        groups = groups_of(gates, batch["attention_mask"])
        for item, chosen in zip(rows, groups, strict=True):
            table[item["domain"]] += np.bincount(chosen.numpy(), minlength=setting.k)
        taken = torch.cat(groups) if setting.routing != "batch" else groups[0]
        decisions += np.bincount(taken.numpy(), minlength=setting.k)
    return {
        "table": table.tolist(),
        "load": decisions.tolist(),
        "entropy": load_entropy(decisions),
        "least_share": float(decisions.min() / decisions.sum()),
    }


@torch.no_grad()
def accuracy(model: nn.Module, setting: Setting) -> dict[str, float]:
    """Measure on test batches of the kind that the model was trained on."""
    right = dict.fromkeys(DOMAINS, 0)
    torch.manual_seed(0)
    for rows in batches_of(data(setting.train, setting.test).test, BATCH, setting.batches):
        batch = inputs(rows)
        hits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
        for item, hit in zip(rows, (hits == batch["labels"]).tolist(), strict=True):
            right[list(DOMAINS)[item["domain"]]] += hit
    return {domain: count / setting.test for domain, count in right.items()}


def one_training(setting: Setting, seed: int, *, measures: bool) -> dict[str, Any]:
    started = time.process_time()  # of the processor, which several trainings may share
    model = adapt(setting, seed)
    torch.manual_seed(1000 + seed)  # the same batches for all settings with this kind of batches
    looked = (inputs(rows) for rows in batches_of(data(setting.train, setting.test).train, BATCH, setting.batches))
    initialize_router(model, looked, max_batches=INITIAL_BATCHES, scale=setting.scale, progress=False)
    before = routes(model, setting)
    torch.manual_seed(2000 + seed)
    train(model, setting)
    return {
        "key": setting.key(seed),
        **asdict(setting),
        "seed": seed,
        "r": rank_of(setting.k),
        "parameters": sum(row.parameters for row in adapted_modules(model)),
        "accuracy": accuracy(model, setting) if measures else {},
        "before": before,
        "after": routes(model, setting),
        "seconds": round(time.process_time() - started, 1),
        "epochs": EPOCHS,
        "batch": BATCH,
        "learning_rate": RATE,
        **provenance(("torch", "transformers", "peft")),
    }


def run(name: str, *, seeds: int, limit: int | None) -> None:
    path = RESULTS / f"routing-{name}.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    done = {json.loads(line)["key"] for line in lines}
    wanted = [(setting, seed) for seed in range(seeds) for setting in settings(name)]
    left = [(setting, seed) for setting, seed in wanted if setting.key(seed) not in done]
    print(f"{name}: {len(wanted) - len(left)} of {len(wanted)} trainings are there")
    for number, (setting, seed) in enumerate(left[:limit], start=1):
        found = one_training(setting, seed, measures=name == "pays")
        with path.open("a") as file:
            file.write(json.dumps(found) + "\n")
        entropy = found["after"]["entropy"]
        print(f"{number}/{len(left)} k={setting.k} {setting.routing} seed {seed}: {entropy:.2f}, {found['seconds']} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    running = actions.add_parser("run")
    running.add_argument("set", choices=SETS)
    running.add_argument("--seeds", type=int, default=3)
    running.add_argument("--limit", type=int, help="stop after so many trainings")
    reporting = actions.add_parser("report")
    reporting.add_argument("set", choices=SETS, nargs="+")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.action == "run":
        run(options.set, seeds=options.seeds, limit=options.limit)
    else:
        for name in options.set:
            write_report(RESULTS / f"routing-{name}.jsonl")


if __name__ == "__main__":
    main()
