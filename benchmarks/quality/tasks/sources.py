"""Where the tasks find their data: rated sentences, and packages of registries, whose files are kept in the cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.problem import Sizes
from examples.data import (
    DataError,
    Sentence,
    cache_folder,
    fetch_sentences,
    is_intact,
    read_domains,
    split_domains,
)
from tucka.errors import expected

_SECONDS = 300
_SYSTEM = Path("/")


def rated_sentences() -> dict[str, list[Sentence]]:
    """Read the four domains of rated sentences, which are fetched once."""
    return read_domains(fetch_sentences())


@dataclass(frozen=True)
class Parts:
    """Sentences to train on, and by domain sentences to choose learning rates with and sentences to report on."""

    train: Sequence[Sentence]
    validation: dict[str, Sequence[Sentence]]
    test: dict[str, Sequence[Sentence]]


def split_sentences(domains: dict[str, list[Sentence]], sizes: Sizes) -> Parts:
    """Split every domain into three; the size of train does not change validation, and neither changes test."""
    rest: dict[str, list[Sentence]] = defaultdict(list)
    tested = split_domains(domains, train=None, test=sizes.test)
    for sentence in tested.train:
        rest[sentence.domain].append(sentence)
    held = split_domains(rest, train=sizes.train, test=sizes.validation)
    return Parts(held.train, dict(held.test), dict(tested.test))


def cached(folder: str, hashes: Mapping[str, str], make: Callable[[Path, Path], None]) -> Path:
    """Return a folder of the cache with files of these hashes; `make(made, scratch)` makes what is not there."""
    kept = cache_folder() / folder
    if all(is_intact(kept / name, wanted) for name, wanted in hashes.items()):
        return kept
    kept.mkdir(parents=True, exist_ok=True)
    # In the cache itself, so that the moves stay on one disk and a file appears only when it is whole.
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=kept) as scratch:
        made, rest = Path(scratch) / "made", Path(scratch) / "rest"
        made.mkdir()
        rest.mkdir()
        try:
            make(made, rest)
        except DataError as error:
            cure = f"Or copy {', '.join(hashes)} into {kept} from a machine where this task has run"
            raise DataError(f"{error}. {cure}") from error
        for name, wanted in hashes.items():
            if not is_intact(made / name, wanted):
                raise DataError(expected(name, f"a file with SHA-256 {wanted[:12]}...", "another", cure=_CHANGED))
            (made / name).replace(kept / name)
    return kept


_CHANGED = "Another release of the package may hold other data, with which results cannot be compared"


def debian_path(package: str, inside: str, scratch: Path) -> Path:
    """Find a folder or a file of a Debian package, which is downloaded and unpacked where it is not installed."""
    if (_SYSTEM / inside).exists():
        return _SYSTEM / inside
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            cure = f"Run it on Debian or Ubuntu, which have the package {package}"
            raise DataError(expected(tool, "Debian's package tools", "none", cure=cure))
    call(["apt-get", "download", "-qq", package], scratch, f"Run apt-get update, or install {package}")
    archives = sorted(scratch.glob(f"{package}_*.deb"))
    if not archives:
        raise DataError(expected(package, "a package downloaded by apt-get", "none", cure="Run apt-get update"))
    call(["dpkg-deb", "-x", str(archives[-1]), "root"], scratch, "Free some space and run it again")
    if not (scratch / "root" / inside).exists():
        raise DataError(expected(package, f"a package with {inside}", archives[-1].name, cure=_CHANGED))
    return scratch / "root" / inside


def call(command: list[str], folder: Path, cure: str) -> None:
    """Run a program in a folder; if it fails, say the first thing that it complained about."""
    english = os.environ | {"LC_ALL": "C"}
    name = " ".join(command[:2])
    try:
        done = subprocess.run(
            command, cwd=folder, env=english, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise DataError(expected(name, f"an end within {_SECONDS} seconds", "none", cure=cure)) from None
    if done.returncode:
        faults = ("E:", "dpkg-deb:", "ERROR:")  # of apt-get, dpkg-deb, pip
        told = [line.removeprefix("E: ") for line in done.stderr.splitlines() if line.startswith(faults)]
        raise DataError(expected(name, "success", (told or ["a failure that said nothing"])[0], cure=cure))
