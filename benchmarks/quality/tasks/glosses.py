"""What is it that a dictionary explains? Glosses of WordNet 3.0, 41 kinds of nouns and verbs."""

# The kinds are the files of WordNet's lexicographers: animals, artefacts, feelings, verbs of motion, and others.

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from benchmarks.quality.problem import Problem, Sizes, Task
from benchmarks.quality.tasks import classes
from benchmarks.quality.tasks.sources import cached, debian_path

PART = "glosses"
MAX_LENGTH = 12  # tokens: what comes first tells most
MOST = 250  # of a kind; the rarest has 42

SHORTEST = 5  # letters that are not enough for a gloss

FOLDER = "wordnet-glosses"  # of the cache
FILE = "glosses.tsv"
SHA256 = "082903fee6d6dee9709cdec49a350fd259a4004e2ed46a4e12224813b21227c9"
_PACKAGE, _INSIDE = "wordnet-base", "usr/share/wordnet"
_FILES = ("data.noun", "data.verb")


def load(sizes: Sizes) -> Problem:
    folder = cached(FOLDER, {FILE: SHA256}, _make)
    rows = classes.read(folder / FILE, PART)
    return classes.problem(PART, rows, sizes, max_length=MAX_LENGTH)


def glosses(lines: Iterable[str]) -> dict[str, set[str]]:
    """Read the glosses of each kind, without what follows a semicolon, and without those of several kinds."""
    kinds: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        if not line.startswith("  "):  # the licence
            gloss = line.split("|", maxsplit=1)[1].split(";")[0].split('"')[0].strip()
            kinds[gloss].add(line.split()[1])
    found: dict[str, set[str]] = defaultdict(set)
    for gloss, own in kinds.items():
        if len(own) == 1 and len(gloss) > SHORTEST:
            found[min(own)].add(gloss)
    return found


def _make(made: Path, scratch: Path) -> None:
    folder = debian_path(_PACKAGE, _INSIDE, scratch)
    lines = [line for name in _FILES for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    classes.write(made / FILE, glosses(lines), most=MOST)


TASK = Task(
    title="glosses of 41 kinds, lower half of MiniLM",
    load=load,
    quick=Sizes(train=1500, validation=400, test=1200, epochs=1, batch_size=16),
    full=Sizes(train=None, validation=400, test=1200, epochs=4, batch_size=16),
    head_rate=classes.RATE,
)
