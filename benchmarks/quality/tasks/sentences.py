"""Are sentences of four domains positive? MiniLM, sentences rated by people (Hutto & Gilbert, 2014)."""

from __future__ import annotations

from benchmarks.quality.problem import Problem, Sizes, Task
from benchmarks.quality.tasks.minilm import text_problem
from benchmarks.quality.tasks.sources import rated_sentences, split_sentences

MAX_LENGTH = 64


def load(sizes: Sizes) -> Problem:
    parts = split_sentences(rated_sentences(), sizes)
    return text_problem(parts.train, parts.validation, parts.test, max_length=MAX_LENGTH)


TASK = Task(
    title="sentences of four domains, MiniLM",
    load=load,
    quick=Sizes(train=300, validation=150, test=500, epochs=2, batch_size=32),
    full=Sizes(train=None, validation=300, test=700, epochs=2, batch_size=32),
    head_rate=3e-3,
)
