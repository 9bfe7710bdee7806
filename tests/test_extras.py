"""Without an optional package, an import names the extra that brings it."""

import re
import tomllib
from pathlib import Path

import pytest

from support.subprocesses import output_of
from tucka.extras import PACKAGES, needs

EXTRAS = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]

# Hidden packages cannot be found, as if they were not installed; nothing else changes.
HIDING = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
try:
    {statement}
except ImportError as error:
    print(type(error).__name__, error, sep=": ")
"""
IMPORTS = {"torch": "tucka.backends.torch", "peft": "tucka.peft", "plots": "tucka.plots", "cli": "tucka.cli"}
# The first of each extra in every run: each takes seconds, since a process of its own imports everything.
CASES = [
    pytest.param(extra, package, marks=[pytest.mark.slow] if place else [])
    for extra in IMPORTS
    for place, package in enumerate(PACKAGES[extra])
]


@pytest.mark.parametrize(("extra", "package"), CASES, ids=lambda part: part)
def test_an_import_without_a_package_names_the_extra(extra, package):
    for name in PACKAGES[extra]:
        pytest.importorskip(name)
    printed = output_of(HIDING.format(package=package, statement=f"import {IMPORTS[extra]}"))
    rule = f"{IMPORTS[extra]}: expected the package {package}, got none. Run: pip install 'tucka[{extra}]'"
    assert printed == f"ModuleNotFoundError: {rule}\n"


def test_a_module_below_names_the_extra_too():
    printed = output_of(HIDING.format(package="torch", statement="from tucka.peft.files import lora"))
    assert printed.startswith("ModuleNotFoundError: tucka.peft: ")
    assert "pip install 'tucka[peft]'" in printed


def test_an_array_of_jax_without_jax_names_the_extra():
    # An array's type is known by the module that made it, so this one stands for JAX.
    make = "import tucka, types; jax = sys.modules['jax'] = types.ModuleType('jax'); jax.Array = type('Array', (), {})"
    printed = output_of(HIDING.format(package="jax", statement=f"{make}; tucka.load_entropy(jax.Array())"))
    assert "JAX arrays: expected" in printed
    assert "'tucka[jax]'" in printed


def test_a_package_that_is_too_old_names_the_extra():
    message = r"tucka\.peft: .* of peft .* got cannot import name 'new'\. Run: pip install --upgrade 'tucka\[peft\]'"
    with pytest.raises(ImportError, match=message), needs("peft", "tucka.peft"):
        raise ImportError("cannot import name 'new'", name="peft.utils")


@pytest.mark.parametrize("error", [ImportError("cannot import name 'x'", name="tucka.core"), ImportError("unknown")])
def test_other_errors_of_an_import_stay_as_they_are(error):
    with pytest.raises(ImportError) as raised, needs("peft", "tucka.peft"):
        raise error
    assert raised.value is error


def test_the_packages_of_an_extra_are_those_of_the_project():
    def names(extra):
        for requirement in EXTRAS[extra]:
            if own := re.match(r"tucka\[(.*)\]", requirement):
                yield from (name for part in own[1].split(",") for name in names(part))
            else:
                yield re.match(r"[\w-]+", requirement)[0]

    for extra, packages in PACKAGES.items():
        assert set(names(extra)) | {"jaxlib"} == {*packages, "jaxlib"}
