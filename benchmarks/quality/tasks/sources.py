"""Where the tasks find what they are made of: installed packages, the rated sentences, packages of Debian.

Files taken from a package of Debian are kept in the user's cache folder, verified, and fetched once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.problem import Sizes, TaskError
from tucka.demo.data import Sentence, read_domains, split_domains
from tucka.demo.disk import check_space, writing
from tucka.demo.download import cache_folder, fetch_sentences
from tucka.demo.errors import DemoError
from tucka.errors import expected

_SECONDS = 300
_SYSTEM = Path("/")


def package_folder(module: str, arguments: str) -> Path:
    """Find the folder of an installed package without importing it.

    Parameters
    ----------
    module : str
        The name to import.
    arguments : str
        What to give to ``pip install``.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    TaskError
        If the package is not installed.
    """
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise TaskError(expected(module, "an installed package", "none", cure=f"Run: pip install {arguments}"))
    return Path(next(iter(found.submodule_search_locations)))


@contextmanager
def task_errors() -> Iterator[None]:
    """Turn the errors of the demo's loaders, which name their cure, into a task's.

    Yields
    ------
    None
        Nothing; the block runs inside.

    Raises
    ------
    TaskError
        If the block raised a `DemoError`.
    """
    try:
        yield
    except DemoError as error:
        raise TaskError(str(error)) from error


def rated_sentences() -> dict[str, list[Sentence]]:
    """Read the four domains of rated sentences, fetching them once.

    Returns
    -------
    dict of str to list of Sentence
        By domain.

    Raises
    ------
    TaskError
        If they cannot be fetched or read.
    """
    with task_errors():
        return read_domains(fetch_sentences())


@dataclass(frozen=True)
class Parts:
    """The sentences to train on, and by domain those to choose with and those to report on."""

    train: Sequence[Sentence]
    validation: dict[str, Sequence[Sentence]]
    test: dict[str, Sequence[Sentence]]


def split_sentences(domains: dict[str, list[Sentence]], sizes: Sizes) -> Parts:
    """Split every domain into three; the test is the same whatever the other sizes, the validation whatever train."""
    rest: dict[str, list[Sentence]] = defaultdict(list)
    with task_errors():
        tested = split_domains(domains, train=None, test=sizes.test)
        for sentence in tested.train:
            rest[sentence.domain].append(sentence)
        held = split_domains(rest, train=sizes.train, test=sizes.validation)
    return Parts(held.train, dict(held.test), dict(tested.test))


def cached(folder: str, hashes: Mapping[str, str], make: Callable[[Path, Path], None], *, space: int) -> Path:
    """Return a folder of the cache that holds intact files, making them where it does not.

    Parameters
    ----------
    folder : str
        Its name inside the cache folder.
    hashes : mapping of str to str
        The SHA-256 of each file, in hexadecimal digits.
    make : callable
        Takes an empty folder for the files, and one that may hold anything and is removed afterwards.
    space : int
        Bytes that must be free to make the files.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    TaskError
        If a file cannot be made or stored, or is not the one that the hash is of.
    """
    kept = cache_folder() / folder
    if all(_intact(kept / name, wanted) for name, wanted in hashes.items()):
        return kept
    with task_errors(), writing(kept):
        check_space(kept, space)
        kept.mkdir(parents=True, exist_ok=True)
        # In the cache itself, so that the final moves stay on one disk; removed whatever happens.
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=kept) as scratch:
            made, rest = Path(scratch) / "made", Path(scratch) / "rest"
            made.mkdir()
            rest.mkdir()
            try:
                make(made, rest)
            except TaskError as error:
                cure = f"Or copy {', '.join(hashes)} into {kept} from a machine where this task has run"
                raise TaskError(f"{error}. {cure}") from error
            for name, wanted in hashes.items():
                if not _intact(made / name, wanted):
                    raise TaskError(expected(name, f"a file with SHA-256 {wanted[:12]}...", "another", cure=_CHANGED))
                (made / name).replace(kept / name)
    return kept


_CHANGED = "Another release of the package may hold other data, with which results cannot be compared"


def _intact(path: Path, wanted: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == wanted


def debian_folder(package: str, inside: str, scratch: Path) -> Path:
    """Find a folder of a Debian package: where the package is installed, else downloaded by apt and unpacked.

    Neither needs an administrator's rights. apt verifies what it downloads.

    Parameters
    ----------
    package : str
        Its name.
    inside : str
        The folder in the package, relative to the system's root.
    scratch : Path
        An existing folder to download and unpack into.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    TaskError
        If there is no apt, it cannot fetch the package, or the package has no such folder.
    """
    if (_SYSTEM / inside).is_dir():
        return _SYSTEM / inside
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            cure = f"Run it on Debian or Ubuntu, which have the package {package}"
            raise TaskError(expected(tool, "Debian's package tools", "none", cure=cure))
    _call(["apt-get", "download", "-qq", package], scratch, f"Run apt-get update, or install {package}")
    archives = sorted(scratch.glob(f"{package}_*.deb"))
    if not archives:
        raise TaskError(expected(package, "a package downloaded by apt-get", "none", cure="Run apt-get update"))
    _call(["dpkg-deb", "-x", str(archives[-1]), "root"], scratch, "Free some space and run it again")
    if not (scratch / "root" / inside).is_dir():
        raise TaskError(expected(package, f"a package with {inside}", archives[-1].name, cure=_CHANGED))
    return scratch / "root" / inside


def _call(command: list[str], folder: Path, cure: str) -> None:
    english = os.environ | {"LC_ALL": "C"}
    name = " ".join(command[:2])
    try:
        done = subprocess.run(
            command, cwd=folder, env=english, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise TaskError(expected(name, f"an end within {_SECONDS} seconds", "none", cure=cure)) from None
    if done.returncode:
        told = [line.removeprefix("E: ") for line in done.stderr.splitlines() if line.startswith(("E:", "dpkg-deb:"))]
        raise TaskError(expected(name, "success", (told or ["a failure that said nothing"])[0], cure=cure))
