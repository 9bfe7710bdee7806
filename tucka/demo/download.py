"""Fetch the human-rated sentences, once, into a cache folder.

They come with the source distribution of vaderSentiment, so pip fetches them from wherever the user's pip fetches
packages. A file appears in the cache only when it is whole: it is downloaded beside it, verified and moved there.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tucka.demo.disk import check_space, writing
from tucka.demo.errors import DemoError
from tucka.errors import expected

__all__ = ["FILE_NAME", "SHA256", "cache_folder", "fetch_sentences"]

FILE_NAME = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"

_PACKAGE, _VERSION = "vadersentiment", "3.3.2"
_SPACE = 20_000_000  # the archive is 2.5 MB; the rest is pip's working room
_SECONDS = 300


def cache_folder() -> Path:
    """Return where downloads are kept: ``$TUCKA_CACHE``, else ``tucka`` in the user's cache folder.

    Returns
    -------
    Path
        The folder; it need not exist yet.
    """
    named = os.environ.get("TUCKA_CACHE")
    if named:
        return Path(named).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "tucka"


def fetch_sentences() -> Path:
    """Return the archive of sentences, downloading it if the cache has no intact copy.

    Returns
    -------
    Path
        The archive in the cache.

    Raises
    ------
    DemoError
        If the archive cannot be downloaded, is damaged, or cannot be stored.
    """
    folder = cache_folder()
    kept = folder / FILE_NAME
    with writing(folder):
        if kept.is_file() and _hash_of(kept) == SHA256:
            return kept
        check_space(folder, _SPACE)
        folder.mkdir(parents=True, exist_ok=True)
        # In the cache itself, so that the final move stays on one disk and is atomic; removed whatever happens.
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=folder) as scratch:
            _download(Path(scratch), kept)
            fetched = Path(scratch) / FILE_NAME
            if not fetched.is_file() or _hash_of(fetched) != SHA256:
                raise _refused(kept, "an archive with another hash")
            fetched.replace(kept)
    return kept


def _hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _download(scratch: Path, kept: Path) -> None:
    """Let pip fetch the source distribution; it checks the hash before it runs anything of the package."""
    wanted = scratch / "requirements.txt"
    wanted.write_text(f"{_PACKAGE}=={_VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", _PACKAGE, "--require-hashes"]
    command += ["--requirement", str(wanted), "--dest", str(scratch), "--quiet", "--no-input", "--retries", "2"]
    command += ["--timeout", "20", "--disable-pip-version-check"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise _refused(kept, f"no answer from pip in {_SECONDS} seconds") from None
    if done.returncode:
        raise _refused(kept, _what_pip_said(done.stderr))


def _what_pip_said(text: str) -> str:
    """Pick what tells most: the full disk, else the network, else the first error, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    full = [line for line in lines if "No space left" in line]
    # Without a network pip goes on to say that there is no such version, which misleads.
    network = ["no connection to the package index"] if any("Retrying (" in line for line in lines) else []
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    told = (full or network or errors or lines[-1:] or ["a failing pip that said nothing"])[0]
    return told if len(told) <= 160 else told[:157] + "..."


def _refused(kept: Path, value: str) -> DemoError:
    cure = f"Check the network and the disk and run it again, or put {FILE_NAME} into {kept.parent} yourself"
    return DemoError(expected("sentences", f"{_PACKAGE} {_VERSION} by pip download", value, cure=cure))
