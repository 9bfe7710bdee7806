"""The sets of versions that the tests run with. `nox --list` shows them; `nox -s NAME` runs one.

Each calls what the Makefile calls, where it has a target. A requirement after ``--`` replaces a floor, for machines
that have other builds: ``nox -s lowest -- torch==2.13.0``. Options there go to pytest: ``--numprocesses=1``.
"""

import re
import tomllib
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
TESTS = ("pytest", "pytest-xdist", "hypothesis")

nox.options.sessions = ["core", "locked"]
nox.options.reuse_existing_virtualenvs = True


def floors(*extras: str) -> list[str]:
    """Return the oldest versions that the project allows, as requirements: ``numpy>=1.26`` gives ``numpy==1.26.*``."""
    asked = [*PROJECT["dependencies"], *(each for extra in extras for each in PROJECT["optional-dependencies"][extra])]
    return [re.sub(r">=([\w.]+)", r"==\1.*", each) for each in asked if not each.startswith("tucka[")]


def replaced(requirements: list[str], by: list[str]) -> list[str]:
    """Put given requirements in the place of those of the same packages."""

    def name(requirement: str) -> str:
        return re.split(r"[^\w-]", requirement)[0]

    given = {name(each): each for each in by}
    return [given.get(name(each), each) for each in requirements]


def make(session: nox.Session, target: str) -> None:
    """Run a target of the Makefile, which makes an environment of its own, for this session's Python."""
    python = Path(session.bin) / "python"
    session.run("make", target, f"PYTHON={python}", f"VENV=.venv-{session.python}", external=True)


def test(session: nox.Session, *arguments: str) -> None:
    """Run tests on two processes, if no option says another number."""
    options = [each for each in session.posargs if each.startswith("-")]
    session.env.update(HF_HUB_OFFLINE="1", CI="1")
    session.run("python", "-m", "pytest", "--numprocesses", "2", "--dist", "worksteal", *arguments, *options)


@nox.session(python=["3.11", "3.12", "3.13"])
def core(session: nox.Session) -> None:
    """Without torch and JAX, on NumPy, SciPy and TensorLy: the suite collects, and what is left passes."""
    # The oldest versions, where they have wheels for this Python.
    versions = replaced(floors(), session.posargs) if session.python == "3.11" else []
    session.install("--editable", ".", *versions, *TESTS)
    test(session)


@nox.session(python="3.11")
def lowest(session: nox.Session) -> None:
    """Run the suite on the oldest version of everything that the project allows."""
    # Matplotlib 3.8 and typer 0.16 call what newer versions of these deprecate, and warnings are errors.
    beside = ["pyparsing<3.3", "click<8.5"]
    versions = replaced([*floors("torch", "peft", "jax", "plots", "cli"), *beside], session.posargs)
    session.install("--editable", ".[peft,jax,plots,cli]", *versions, *TESTS)
    test(session, *(f"tests/{part}" for part in ("core", "arrays", "backends", "peft", "plots", "cli")), "tucka")


@nox.session(python=["3.11", "3.12", "3.13"])
def locked(session: nox.Session) -> None:
    """Run the suite on the pinned versions, as CI does, and measure the branches that it takes."""
    make(session, "coverage")


@nox.session(python=["3.11", "3.13"])
def newest(session: nox.Session) -> None:
    """Run the suite on the newest version of everything but torch."""
    make(session, "test-newest")


@nox.session(python="3.11")
def clients(session: nox.Session) -> None:
    """Train with the libraries that use PEFT, and run PEFT's own tests."""
    make(session, "test-clients")


@nox.session(python="3.11")
def architectures(session: nox.Session) -> None:
    """Adapt tiny models of many architectures."""
    make(session, "test-architectures")


@nox.session(python="3.11")
def quantised(session: nox.Session) -> None:
    """Adapt 4- and 8-bit layers."""
    make(session, "test-quantised")


@nox.session(python="3.11")
def distributed(session: nox.Session) -> None:
    """Run the tests with two processes."""
    make(session, "test-distributed")


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """Check style, types, docstrings and spelling."""
    make(session, "lint")


@nox.session(python="3.11")
def docs(session: nox.Session) -> None:
    """Build the site, with its tutorials, and check it."""
    make(session, "docs")


@nox.session(python="3.11")
def archives(session: nox.Session) -> None:
    """Build the wheel and the source archive in dist/, and check them."""
    session.install("build", "twine")
    session.run("python", "-m", "build", "--outdir", "dist")
    session.run("python", "-m", "twine", "check", "--strict", *map(str, (ROOT / "dist").glob("tucka-*")))
