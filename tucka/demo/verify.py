"""Load a saved adapter in a process of its own and predict again: ``python -m tucka.demo.verify FOLDER``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file

import tucka.peft  # noqa: F401 - makes PEFT know the method
from tucka.demo.data import read_domains, split_domains
from tucka.demo.disk import whole_file
from tucka.demo.download import fetch_sentences
from tucka.demo.model import Collator, encode, load_classifier
from tucka.demo.training import predict

__all__ = ["ADAPTER", "PREDICTIONS", "Comparison", "compare", "main", "write_predictions"]

ADAPTER, PREDICTIONS = "adapter", "predictions.safetensors"


@dataclass(frozen=True)
class Comparison:
    """How the predictions of a loaded adapter compare with those of the one that was saved.

    Parameters
    ----------
    sentences : int
        How many were predicted.
    identical : bool
        Whether all logits are equal bit for bit.
    difference : float
        The largest between two logits.
    """

    sentences: int
    identical: bool
    difference: float


def write_predictions(folder: Path, logits: Mapping[str, torch.Tensor], settings: Mapping[str, int]) -> None:
    """Keep predictions, and what is needed to make them again.

    Parameters
    ----------
    folder : Path
        The demo's.
    logits : mapping of str to Tensor
        By domain.
    settings : mapping of str to int
        ``test`` sentences of each domain, ``max_length``, ``threads``.
    """
    with whole_file(folder / PREDICTIONS) as path:
        save_file(dict(logits), path, metadata={name: str(value) for name, value in settings.items()})


def _read_predictions(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    with safe_open(folder / PREDICTIONS, framework="pt") as file:
        settings = {name: int(value) for name, value in file.metadata().items()}
        return {name: file.get_tensor(name) for name in file.keys()}, settings  # noqa: SIM118 - no mapping


def compare(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> Comparison:
    """Compare two sets of predictions.

    Parameters
    ----------
    before, after : mapping of str to Tensor
        Logits of the same sentences, by domain.

    Returns
    -------
    Comparison
        Over all domains.
    """
    identical = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    difference = max(float((before[name] - after[name]).abs().max()) for name in before)
    return Comparison(sum(len(rows) for rows in before.values()), identical, difference)


def _predict_again(folder: Path, settings: Mapping[str, int]) -> dict[str, torch.Tensor]:
    # The order of a sum, and so its last bits, depend on the number of threads.
    torch.set_num_threads(settings["threads"])
    # Another seed than any training's: the head, too, must come from the file.
    classifier, tokenizer = load_classifier(seed=2**31)
    model: Any = PeftModel.from_pretrained(classifier, folder / ADAPTER).eval()
    collator = Collator(tokenizer.pad_token_id)
    split = split_domains(read_domains(fetch_sentences()), train=0, test=settings["test"])
    return {
        domain: predict(model, encode(tokenizer, sentences, max_length=settings["max_length"]), collator)
        for domain, sentences in split.test.items()
    }


def main(arguments: Sequence[str]) -> int:
    """Predict again and write the comparison to standard output, as JSON.

    Parameters
    ----------
    arguments : sequence of str
        The folder that the demo wrote to.

    Returns
    -------
    int
        The exit code; 0 if nothing failed, whatever the comparison says.
    """
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m tucka.demo.verify FOLDER\n")
        return 2
    folder = Path(arguments[0])
    before, settings = _read_predictions(folder)
    sys.stdout.write(json.dumps(asdict(compare(before, _predict_again(folder, settings)))) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
