"""The files around the package: what is built from them, and what they say about it."""

import ast
import importlib.util
import re
import subprocess
import sys
import tarfile
import tomllib
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


SESSIONS = {
    node.name: ast.unparse(node)
    for node in ast.parse((ROOT / "noxfile.py").read_text()).body
    if isinstance(node, ast.FunctionDef) and any("nox.session" in ast.unparse(each) for each in node.decorator_list)
}
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def sessions_of(workflow):
    """The sessions that a workflow runs, each with its Python where it says which."""
    for job in WORKFLOWS[workflow]["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        rows = list(matrix.get("include", []))
        rows += [
            {"session": session, "python": python}
            for session in matrix.get("session", [None])
            for python in matrix.get("python", [])
        ]
        for step in job["steps"]:
            if name := re.search(r"nox --session (.+?)( --python|$)", step.get("run", "")):
                yield from ((row.get("session") or name[1], row["python"]) for row in rows or [{"python": None}])


def test_the_sessions_are_those_that_the_page_lists():
    page = (ROOT / "docs" / "contributing.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*\| `(\w+)`[^|]*\|$", page, re.MULTILINE)
    assert [name for name, _ in rows] == list(SESSIONS)
    for name, workflow in rows:
        assert name in {session for session, _ in sessions_of(workflow)}, (name, workflow)


def test_workflows_run_sessions_that_there_are_on_every_python_that_is_claimed():
    assert WORKFLOWS.keys() == {"tests", "newest", "docs", "release"}
    run_there = [each for workflow in WORKFLOWS for each in sessions_of(workflow)]
    assert {name for name, _ in run_there} == SESSIONS.keys()
    for name, python in run_there:
        assert python is None or f"'{python}'" in SESSIONS[name].partition("def ")[0], (name, python)
    claimed = {each.rpartition(" ")[2] for each in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", each)}
    for name in ("core", "locked"):
        assert {python for session, python in run_there if session == name} == claimed


def test_sessions_call_targets_that_there_are():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = {target for code in SESSIONS.values() for target in re.findall(r"make\(session, '([a-z-]+)'\)", code)}
    assert "test-newest" in called
    assert called <= targets


def test_the_oldest_versions_are_the_floors_of_the_project():
    """Run the functions of noxfile.py that need no nox."""
    code = ast.parse((ROOT / "noxfile.py").read_text())
    code.body = [node for node in code.body if getattr(node, "name", "") in ("floors", "replaced")]
    names = {"re": re, "PROJECT": PROJECT}
    exec(compile(code, "noxfile.py", "exec"), names)
    floors = names["floors"]("torch", "peft")
    assert "torch==2.5.*" in floors
    assert all("==" in each for each in floors)
    replaced = names["replaced"](floors, ["torch==9.9"])
    assert set(replaced) ^ set(floors) == {"torch==2.5.*", "torch==9.9"}


def test_what_needs_a_missing_package_is_known():
    spec = importlib.util.spec_from_file_location("collecting", ROOT / "conftest.py")
    collecting = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(collecting)
    assert not {"torch", "jax", "peft"} & collecting.needed_by(ROOT / "tests" / "core" / "test_modes.py")
    assert "torch" not in collecting.needed_by(ROOT / "tucka" / "core" / "experts.py")
    assert "peft" in collecting.needed_by(ROOT / "tucka" / "peft" / "files" / "card.py")
    assert {"torch", "peft"} <= collecting.needed_by(ROOT / "tests" / "peft" / "files" / "test_card.py")
    assert "peft" in collecting.needed_by(ROOT / "README.md")


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
