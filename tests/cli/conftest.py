"""The command line as a user calls it."""

from types import SimpleNamespace

import pytest

from tucka import cli


@pytest.fixture
def invoke(monkeypatch, capsys):
    """Run the command line at a terminal 100 columns wide; return its exit code and what it wrote."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments):
        code = cli.run(arguments)
        written = capsys.readouterr()
        return SimpleNamespace(code=code, out=written.out, err=written.err)

    return run


@pytest.fixture
def fails(invoke):
    """Run the command line, and assert that it fails with exit code 2 and one line that has all of some words."""

    def run(arguments, *words):
        result = invoke(*arguments)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("tucka: ")
        assert result.err.count("\n") == 1
        assert [word for word in words if word not in result.err] == []

    return run
