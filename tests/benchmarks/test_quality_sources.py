"""What the quality benchmark's tasks are made of: packages of Debian, fetched once, whole and verified."""

import hashlib
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.quality.tasks import sources
from examples.data import DataError


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TUCKA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_SYSTEM", tmp_path / "system")
    return tmp_path / "cache"


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert "expected" in message
    return message


def test_sentences_that_cannot_be_fetched_are_one_line(cache, monkeypatch):
    failed = SimpleNamespace(returncode=1, stdout="", stderr="ERROR: none\n")
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_kwargs: failed)
    with pytest.raises(DataError, match="sentences: ") as error:
        sources.rated_sentences()
    one_line(error)


CONTENT = b"as if it were data"
HASHES = {"data.txt": hashlib.sha256(CONTENT).hexdigest()}
INSIDE = "usr/share/data"


def apt_that(
    monkeypatch, *, writes: dict[str, bytes] | None = None, fails: str = "", says: str = "", slow=False
) -> list:
    """Replace apt-get and dpkg-deb, the second of which unpacks these files; return the list of their calls."""
    calls = []

    def run(command, *, cwd, timeout, **_kwargs):
        calls.append(command)
        if slow:
            raise subprocess.TimeoutExpired(command, timeout)
        if command[0] == fails:
            return SimpleNamespace(returncode=100, stdout="", stderr=says)
        if command[0] == "apt-get" and writes is not None:
            (cwd / "thing_1_all.deb").touch()
        for name, content in (writes or {}).items() if command[0] == "dpkg-deb" else ():
            path = cwd / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(shutil, "which", lambda tool: f"/usr/bin/{tool}")
    return calls


def take(made: Path, scratch: Path) -> None:
    folder = sources.debian_path("thing", INSIDE, scratch)
    shutil.copyfile(folder / "data.txt", made / "data.txt")


def fetch() -> Path:
    return sources.cached("things", HASHES, take)


def test_a_package_is_fetched_once(cache, monkeypatch):
    calls = apt_that(monkeypatch, writes={f"{INSIDE}/data.txt": CONTENT})
    assert fetch() == fetch() == cache / "things"
    assert [path.read_bytes() for path in (cache / "things").iterdir()] == [CONTENT]
    assert [command[0] for command in calls] == ["apt-get", "dpkg-deb"]


def test_a_damaged_file_of_the_cache_is_fetched_again(cache, monkeypatch):
    apt_that(monkeypatch, writes={f"{INSIDE}/data.txt": CONTENT})
    (fetch() / "data.txt").write_bytes(CONTENT[:3])
    assert (fetch() / "data.txt").read_bytes() == CONTENT


def test_an_installed_package_is_not_fetched(cache, monkeypatch):
    calls = apt_that(monkeypatch)
    folder = sources._SYSTEM / INSIDE
    folder.mkdir(parents=True)
    (folder / "data.txt").write_bytes(CONTENT)
    assert (fetch() / "data.txt").read_bytes() == CONTENT
    assert not calls


FAILURES = {
    "no such package": ({"fails": "apt-get", "says": "W: x\nE: Unable to locate package\n"}, "got Unable to locate"),
    "silence": ({"fails": "apt-get"}, "said nothing"),
    "no file": ({}, "apt-get update"),
    "damaged": ({"writes": {}, "fails": "dpkg-deb", "says": "dpkg-deb: error: not an archive"}, "not an archive"),
    "slow network": ({"slow": True}, "within 300 seconds"),
    "another package": ({"writes": {"usr/other": b""}}, f"a package with {INSIDE}"),
    "another release": ({"writes": {f"{INSIDE}/data.txt": b"new"}}, "SHA-256"),
}


@pytest.mark.parametrize(("behaviour", "told"), FAILURES.values(), ids=FAILURES)
def test_a_failed_fetch_is_one_clear_line_and_leaves_nothing(cache, monkeypatch, behaviour, told):
    apt_that(monkeypatch, **behaviour)
    with pytest.raises(DataError) as error:
        fetch()
    assert told in one_line(error)
    assert list((cache / "things").iterdir()) == []
