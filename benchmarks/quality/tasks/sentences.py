"""Are sentences of four domains positive? MiniLM, sentences rated by people (Hutto & Gilbert, 2014)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from benchmarks.quality.problem import Item, Problem, Sizes, Task
from tucka.demo.data import Sentence, read_domains, split_domains
from tucka.demo.download import fetch_sentences
from tucka.demo.model import Collator, encode, load_classifier

MAX_LENGTH = 64


def load(sizes: Sizes) -> Problem:
    count = None if sizes.train is None else sizes.train + sizes.validation
    split = split_domains(read_domains(fetch_sentences()), train=count, test=sizes.test)
    _, tokenizer = load_classifier(seed=0)

    def items(sentences: Iterable[Sentence]) -> list[Item]:
        rows = list(sentences)
        encoded = encode(tokenizer, rows, max_length=MAX_LENGTH)
        return [item | {"text": row.text} for item, row in zip(encoded, rows, strict=True)]

    train, validation = _hold_out(split.train, sizes.validation)
    return Problem(
        model=lambda seed: load_classifier(seed=seed)[0],
        train=items(train),
        validation={domain: items(rows) for domain, rows in validation.items()},
        test={domain: items(rows) for domain, rows in split.test.items()},
        collator=Collator(tokenizer.pad_token_id),
        targets=("query", "value", "dense"),
        head=("head",),
    )


def _hold_out(sentences: Sequence[Sentence], count: int) -> tuple[list[Sentence], dict[str, list[Sentence]]]:
    """Take every domain's share of the validation evenly from its sentences, whose order does not tell their label."""
    domains: dict[str, list[Sentence]] = defaultdict(list)
    for sentence in sentences:
        domains[sentence.domain].append(sentence)
    held = {}
    for domain, rows in domains.items():
        step = len(rows) / count
        held[domain] = [rows[int(place * step)] for place in range(count)]
    chosen = {id(sentence) for rows in held.values() for sentence in rows}
    return [sentence for sentence in sentences if id(sentence) not in chosen], held


TASK = Task(
    title="sentences of four domains, MiniLM",
    load=load,
    quick=Sizes(train=300, validation=150, test=600, epochs=2, batch_size=32),
    full=Sizes(train=None, validation=300, test=700, epochs=2, batch_size=32),
    head_rate=3e-3,
)
