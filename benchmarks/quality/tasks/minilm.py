"""MiniLM as a classifier of any texts with two labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.quality.problem import Item, Problem
from examples.data import Sentence
from examples.sentence_classifier import Collator, encode, load_classifier


def text_problem(
    train: Sequence[Sentence],
    validation: Mapping[str, Sequence[Sentence]],
    test: Mapping[str, Sequence[Sentence]],
    *,
    max_length: int,
) -> Problem:
    """Make the problem of classifying texts with MiniLM; adapters are on all linear layers but the attention's keys."""
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
