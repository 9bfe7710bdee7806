"""The public names: complete, sorted, documented, annotated, each on a page of the reference."""

import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from numpydoc.docscrape import ClassDoc, FunctionDoc

import tucka

PAGES = Path(__file__).parent.parent / "docs" / "reference"
PACKAGES = ["tucka", "tucka.backends", "tucka.backends.torch", "tucka.peft", "tucka.plots"]
MODULES = {name: importlib.import_module(name) for name in PACKAGES}
PUBLIC = {f"{package}.{name}": getattr(module, name) for package, module in MODULES.items() for name in module.__all__}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value) and value is not Any}
ERRORS = {name: kind for name, kind in CLASSES.items() if issubclass(kind, Exception)}
RECORDS = {name: kind for name, kind in CLASSES.items() if name not in ERRORS}
# Of the mathematics; what a module of torch or of PEFT has is theirs.
METHODS = {
    f"{name}.{attribute}": getattr(kind, attribute)
    for name, kind in RECORDS.items()
    if name.count(".") == 1
    for attribute in dir(kind)
    if not attribute.startswith("_") and inspect.isroutine(getattr(kind, attribute))
}
MADE_BY_PEFT = {"TuckALayer", "TuckAModel"}
# What scripts outside of this repository call.
AGREED = {
    "TuckerExperts",
    "affinity_logits",
    "compress",
    "count_flops",
    "count_parameters",
    "data_aware_centroids",
    "fit_experts",
    "householder_experts",
    "householder_gamma",
    "householder_product",
    "kaiming_centroids",
    "load_entropy",
    "mode_product",
    "multi_mode_product",
    "routing_feature",
    "select_gates",
}

every_package = pytest.mark.parametrize("package", MODULES)
every_function = pytest.mark.parametrize("function", (FUNCTIONS | METHODS).values(), ids=list(FUNCTIONS | METHODS))
every_record = pytest.mark.parametrize("kind", RECORDS.values(), ids=list(RECORDS))


def names_on(text):
    """The full names that a page documents."""
    module = ""
    for line in text.splitlines():
        if found := re.match(r"\.\. currentmodule:: (\S+)", line):
            module = found[1]
        elif found := re.match(r"\.\. auto(?:function|class|exception|data):: (\S+)", line):
            yield found[1] if found[1].startswith("tucka.") else f"{module}.{found[1]}"


ON_PAGES = [name for page in sorted(PAGES.glob("*.md")) for name in names_on(page.read_text("utf-8"))]


@every_package
def test_the_list_of_public_names_is_sorted_and_without_duplicates(package):
    listed = MODULES[package].__all__
    assert listed == sorted(set(listed))


@every_package
def test_the_list_of_public_names_is_complete(package):
    public = {
        name
        for name, value in vars(MODULES[package]).items()
        if not isinstance(value, ModuleType) and (not name.startswith("_") or name == "__version__")
    }
    # The function that registers the method with PEFT has done its work when the package is there.
    assert set(MODULES[package].__all__) == public - ({"register"} if package == "tucka.peft" else set())


def test_what_others_call_is_public():
    assert set(tucka.__all__) >= AGREED
    assert callable(tucka.backends.register)


@every_package
def test_every_public_name_stands_on_a_page(package):
    missing = [name for name in MODULES[package].__all__ if f"{package}.{name}" not in ON_PAGES]
    assert [name for name in missing if not name.startswith("__")] == []


def test_a_page_names_what_there_is_and_once():
    assert len(ON_PAGES) == len(set(ON_PAGES))
    for name in ON_PAGES:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_errors_are_tuckas_and_value_errors():
    assert {name.removeprefix("tucka.") for name in ERRORS} == {
        "ArrayError",
        "CheckpointError",
        "ConfigError",
        "RouteError",
        "ShapeError",
        "TuckaError",
    }
    assert all(issubclass(kind, tucka.TuckaError) and issubclass(kind, ValueError) for kind in ERRORS.values())
    assert issubclass(tucka.ArrayError, TypeError)


@every_function
def test_a_public_function_documents_its_parameters_results_and_an_example(function):
    documentation = FunctionDoc(function)
    assert documentation["Summary"]
    documented = {name.strip().lstrip("*") for entry in documentation["Parameters"] for name in entry.name.split(",")}
    assert documented == set(inspect.signature(function).parameters) - {"self"}
    if inspect.signature(function).return_annotation not in (None, "None"):
        assert documentation["Returns"] or documentation["Yields"]
    assert any(line.startswith(">>> ") for line in documentation["Examples"])


@every_record
def test_a_public_class_documents_its_parameters_and_an_example(kind):
    documentation = ClassDoc(kind)
    assert documentation["Summary"]
    documented = {name.strip().lstrip("*") for entry in documentation["Parameters"] for name in entry.name.split(",")}
    inherited = {name for base in kind.__bases__ for name in inspect.signature(base).parameters}
    assert documented <= set(inspect.signature(kind).parameters) <= documented | inherited
    if kind.__name__ not in MADE_BY_PEFT:
        assert any(line.startswith(">>> ") for line in documentation["Examples"])


@pytest.mark.parametrize("kind", ERRORS.values(), ids=list(ERRORS))
def test_an_error_says_what_it_means(kind):
    assert ClassDoc(kind)["Summary"]


@every_function
def test_every_parameter_and_result_of_a_public_function_is_annotated(function):
    signature = inspect.signature(function)
    parameters = [parameter for name, parameter in signature.parameters.items() if name != "self"]
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in parameters)
    assert signature.return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=list(FUNCTIONS))
def test_what_is_no_array_is_passed_by_name(function):
    """No argument that has a default or is a number comes by position."""
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            assert parameter.default is inspect.Parameter.empty
            assert parameter.annotation not in ("int", "float", "bool")


# What is taken where nothing is said. A change of one changes results that users have, and belongs in the changelog.
DEFAULTS = {
    **{"alpha": 1.0, "temperature": 1.0, "learning_rate": 1.0, "covariance": 1.0, "scale": 1.0},
    **{"r": 8, "rank": 8, "k": 2, "groups": 2, "t": 2, "experts_per_group": 2, "p": 2, "expert_rank": 2},
    **{"seed": 0, "router_seed": 0, "balance_rate": 0.0, "dropout": 0.0, "iterations": 0, "tucka_format": 1},
    **{"window": 32, "below": 0.5, "least": 1, "collapse_window": 32, "collapse_below": 0.5, "max_batches": 32},
    "itemsize": 4,
}


def test_the_numbers_that_are_taken_where_none_is_given():
    called = {
        name: value for name, value in (FUNCTIONS | METHODS | RECORDS).items() if not name.startswith("tucka.plots")
    }
    found = {
        (parameter.name, parameter.default)
        for value in called.values()
        for parameter in inspect.signature(value).parameters.values()
        if type(parameter.default) in (int, float) and parameter.default == parameter.default  # no NaN
    }
    assert found == set(DEFAULTS.items())
