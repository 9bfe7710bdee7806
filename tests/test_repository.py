"""The files around the package: what is built from them, and what they say about it."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import tucka

ROOT = Path(__file__).parent.parent


def run(*command, where=ROOT):
    result = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == tucka.__version__
    newest = re.search(
        r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert newest[1] == tucka.__version__


def test_the_citation_is_the_readmes():
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert paper["title"].replace("TuckA", "{TuckA}") in readme
    authors = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert " and ".join(authors) in readme
    assert paper["identifiers"][0]["value"] in readme


@pytest.mark.parametrize("template", ["bug", "feature"])
def test_a_template_asks_for_versions_and_a_reproduction(template):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{template}.yml").read_text())
    fields = {field["id"]: field for field in form["body"]}
    assert fields.keys() >= {"versions", "reproduction"}
    assert fields["versions"]["validations"]["required"]


def test_a_commit_passes_what_ci_runs():
    hooks = [
        hook
        for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repo["hooks"]
    ]
    assert [hook["entry"] for hook in hooks] == ["make lint"]
    assert hooks[0]["always_run"]
    assert not hooks[0]["pass_filenames"]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md"])
def test_the_pages_of_the_root_link_to_files(page):
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text())
    assert [link for link in links if not re.match(r"[a-z]+:", link) and not (ROOT / link).exists()] == []


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source archive, and the wheel that is built from it."""
    pytest.importorskip("hatchling")
    if not (ROOT / ".git").exists():
        pytest.skip("needs git's list of files")
    folder = tmp_path_factory.mktemp("dist")
    pytest.importorskip("build.__main__")
    run(
        sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT), where=folder
    )  # not in a folder with "build" in it
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def tracked(*folders):
    return set(run("git", "ls-files", *folders).split())


@pytest.mark.slow
def test_the_wheel_has_the_package_and_nothing_else(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    about = f"tucka-{tucka.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(about)} == tracked("tucka")
    assert "tucka/py.typed" in names
    assert {name.removeprefix(about) for name in names if name.startswith(about)} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
    }


@pytest.mark.slow
def test_the_source_archive_has_all_that_is_tracked(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    # git's own list of what to ignore is what the builder reads; .ci is of one host.
    assert names - {"PKG-INFO", ".gitignore"} == tracked() - {".ci/run", ".gitignore"}


@pytest.mark.slow
def test_tests_pass_in_the_unpacked_source_archive(built, tmp_path):
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    few = [
        "tests/test_repository.py",
        "tests/test_documents.py",
        "tests/test_architecture.py",
        "tests/core/test_modes.py",
    ]
    printed = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *few, where=root)
    assert "passed" in printed


@pytest.mark.slow
def test_the_index_can_show_the_description(built):
    pytest.importorskip("twine")
    assert run(sys.executable, "-m", "twine", "check", "--strict", *map(str, built)).count("PASSED") == 2
