"""Of which language is a word? Lists of words of 16 languages, from Debian's packages for spelling."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from benchmarks.quality.problem import Problem, Sizes, Task
from benchmarks.quality.tasks import classes
from benchmarks.quality.tasks.sources import cached, debian_path

PART = "languages"
MAX_LENGTH = 12  # tokens, which almost no word of ten letters exceeds
MOST = 700  # words of a language
LETTERS = range(4, 11)  # of a word

FOLDER = "words-of-languages"  # of the cache
FILE = "words-of-languages.tsv"
SHA256 = "eca6c2d4ec6ccebfc1f15671b4d17e1ac4a339bf4d4201be43cc86edd12bca8e"
_INSIDE = "usr/share/dict"
# By package: the name of its list.
_LISTS = {
    "wamerican-small": "american-english-small",
    "wcatalan": "catalan",
    "wdanish": "danish",
    "wdutch": "dutch",
    "wesperanto": "esperanto",
    "wfaroese": "faroese",
    "wfrench": "french",
    "wgaelic": "gaelic",
    "wgalician-minimos": "galician-minimos",
    "wirish": "irish",
    "witalian": "italian",
    "wmanx": "manx",
    "wngerman": "ngerman",
    "wportuguese": "portuguese",
    "wspanish": "spanish",
    "wswedish": "swedish",
}
_ENCODINGS = {"manx": "latin-1", "swedish": "latin-1"}


def load(sizes: Sizes) -> Problem:
    folder = cached(FOLDER, {FILE: SHA256}, _make)
    rows = classes.read(folder / FILE, PART)
    return classes.problem(PART, rows, sizes, max_length=MAX_LENGTH)


def own_words(lists: Mapping[str, str]) -> dict[str, set[str]]:
    """Take the words in small letters of each list that are in no other list."""
    found = {name: set(unicodedata.normalize("NFC", text).split()) for name, text in lists.items()}
    shared = Counter(word for words in found.values() for word in words)
    return {
        name: {word for word in words if shared[word] == 1 and word.isalpha() and word.islower() and _fits(word)}
        for name, words in found.items()
    }


def _fits(word: str) -> bool:
    return len(word) in LETTERS


def _make(made: Path, scratch: Path) -> None:
    lists = {}
    for package, name in _LISTS.items():
        own = scratch / package
        own.mkdir()
        lists[name] = debian_path(package, f"{_INSIDE}/{name}", own).read_text(encoding=_ENCODINGS.get(name, "utf-8"))
    classes.write(made / FILE, own_words(lists), most=MOST)


TASK = Task(
    title="words of 16 languages, lower half of MiniLM",
    load=load,
    quick=Sizes(train=4000, validation=800, test=1500, epochs=1, batch_size=16),
    full=Sizes(train=None, validation=800, test=2000, epochs=8, batch_size=16),
    head_rate=classes.RATE,
)
