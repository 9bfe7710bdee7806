"""Four domains of sentences that people rated, as labelled and split data.

The ratings are means of about twenty people between -4 and 4 [1]_. A sentence is kept if its mean rating is further
than 0.3 from neutral; its label is the sign. A text that occurs twice in a domain is kept once, so that no test
sentence has been trained on.

.. [1] C.J. Hutto and E.E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
   Text", ICWSM 2014.
"""

from __future__ import annotations

import hashlib
import html
import io
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tucka.demo.errors import DemoError
from tucka.errors import expected

__all__ = ["DOMAINS", "Sentence", "Split", "read_domains", "split_domains"]

DOMAINS = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}

_INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
_NEUTRAL = 0.3


@dataclass(frozen=True)
class Sentence:
    """One rated sentence.

    Parameters
    ----------
    domain : str
        Where it is from, a key of `DOMAINS`.
    text : str
        The sentence.
    label : int
        1 if people rated it positive, 0 if negative.
    """

    domain: str
    text: str
    label: int


@dataclass(frozen=True)
class Split:
    """Sentences to train on and sentences to test with.

    Parameters
    ----------
    train : tuple of Sentence
        All domains together.
    test : dict of str to tuple of Sentence
        By domain.
    """

    train: tuple[Sentence, ...]
    test: dict[str, tuple[Sentence, ...]]


def read_domains(archive: Path) -> dict[str, list[Sentence]]:
    """Read the rated sentences of all domains.

    Parameters
    ----------
    archive : Path
        vaderSentiment's source distribution, see `tucka.demo.download`.

    Returns
    -------
    dict of str to list of Sentence
        By domain, in the files' order.

    Raises
    ------
    DemoError
        If the archive is damaged or lacks a domain.
    """
    try:
        with tarfile.open(archive, "r:gz") as outer:
            sets = io.BytesIO(_member(outer, _INNER))
        with tarfile.open(fileobj=sets, mode="r:gz") as inner:
            return {domain: _parse(domain, _member(inner, name)) for domain, name in DOMAINS.items()}
    except (tarfile.TarError, zlib.error, EOFError, OSError, KeyError, ValueError, IndexError) as error:
        value = f"{type(error).__name__}: {error}"
        cure = "Delete this file and run it again"
        raise DemoError(expected(str(archive), "rated sentences", value, cure=cure)) from error


def _member(archive: tarfile.TarFile, ending: str) -> bytes:
    for name in archive.getnames():
        if name.endswith(ending):
            stream = archive.extractfile(name)
            if stream is not None:
                return stream.read()
    raise KeyError(ending)


def _parse(domain: str, raw: bytes) -> list[Sentence]:
    """Read lines of id, rating and text, separated by tabs."""
    kept: dict[str, Sentence] = {}
    for line in raw.decode("utf-8").split("\n"):
        if line.strip():
            _, rating, text = line.split("\t", maxsplit=2)
            if abs(float(rating)) > _NEUTRAL:
                text = html.unescape(text).strip()
                kept.setdefault(text, Sentence(domain, text, int(float(rating) > 0)))
    if not kept:
        raise ValueError(domain)
    return list(kept.values())


def split_domains(domains: Mapping[str, list[Sentence]], *, train: int | None, test: int) -> Split:
    """Take a test set and a training sample of every domain, each with the domain's share of positive sentences.

    A hash of the text decides who goes where. So the split depends on no random generator, seed or order, the test
    set is the same whatever the size of the training sample, and a smaller sample is a part of every larger one.

    Parameters
    ----------
    domains : mapping of str to list of Sentence
        From `read_domains`.
    train : int, optional
        Training sentences of each domain; all that remain if None or if there are fewer.
    test : int
        Test sentences of each domain.

    Returns
    -------
    Split
        The two sets, disjoint.

    Raises
    ------
    DemoError
        If a domain has too few sentences for its test set and one training sentence of each label.
    """
    trained: list[Sentence] = []
    tested: dict[str, tuple[Sentence, ...]] = {}
    for domain, sentences in domains.items():
        if len(sentences) - test < 2:
            cure = "Ask for fewer to test with"
            raise DemoError(expected(domain, f"at least {test + 2} sentences", len(sentences), cure=cure))
        ordered = sorted(sentences, key=_order)
        taken = set(_stratified(ordered, test))
        rest = [sentence for sentence in ordered if sentence not in taken]
        tested[domain] = tuple(sentence for sentence in ordered if sentence in taken)
        trained += _stratified(rest, len(rest) if train is None else min(train, len(rest)))
    return Split(tuple(trained), tested)


def _order(sentence: Sentence) -> bytes:
    return hashlib.sha256(f"{sentence.domain}\t{sentence.text}".encode()).digest()


def _stratified(ordered: list[Sentence], count: int) -> Iterator[Sentence]:
    """Yield the first of each label, as many as keep the share of the labels to the nearest sentence."""
    positive = round(count * sum(sentence.label for sentence in ordered) / max(1, len(ordered)))
    left = {1: positive, 0: count - positive}
    for sentence in ordered:
        if left[sentence.label] > 0:
            left[sentence.label] -= 1
            yield sentence
