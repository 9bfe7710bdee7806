"""The public names: complete, sorted, documented, annotated."""

import inspect
from types import ModuleType

import pytest
from numpydoc.docscrape import ClassDoc, FunctionDoc

import tucka
import tucka.backends

FUNCTIONS = {name: getattr(tucka, name) for name in tucka.__all__ if inspect.isfunction(getattr(tucka, name))}
FUNCTIONS |= {f"backends.{name}": getattr(tucka.backends, name) for name in ("register", "backend_of")}
CLASSES = {name: getattr(tucka, name) for name in tucka.__all__ if inspect.isclass(getattr(tucka, name))}
RECORDS = {name: kind for name, kind in CLASSES.items() if not issubclass(kind, Exception)}
METHODS = {
    f"{name}.{attribute}": method
    for name, kind in RECORDS.items()
    for attribute, method in inspect.getmembers(kind, inspect.isfunction)
    if not attribute.startswith("_")
}

every_function = pytest.mark.parametrize("function", (FUNCTIONS | METHODS).values(), ids=list(FUNCTIONS | METHODS))
every_class = pytest.mark.parametrize("kind", CLASSES.values(), ids=list(CLASSES))

AGREED = {
    "TuckerExperts",
    "affinity_logits",
    "data_aware_centroids",
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


def test_the_list_of_public_names_is_sorted_and_without_duplicates():
    assert tucka.__all__ == sorted(set(tucka.__all__))


def test_the_list_of_public_names_is_complete():
    public = {
        name
        for name, value in vars(tucka).items()
        if not isinstance(value, ModuleType) and (not name.startswith("_") or name == "__version__")
    }
    assert set(tucka.__all__) == public
    assert public >= AGREED


def test_errors_are_tuckas_and_value_errors():
    errors = [kind for kind in CLASSES.values() if issubclass(kind, Exception)]
    assert len(errors) == 5
    assert all(issubclass(kind, tucka.TuckaError) and issubclass(kind, ValueError) for kind in errors)


@every_function
def test_a_public_function_documents_its_parameters_results_and_an_example(function):
    documentation = FunctionDoc(function)
    assert documentation["Summary"]
    documented = {name.strip().lstrip("*") for entry in documentation["Parameters"] for name in entry.name.split(",")}
    assert documented == set(inspect.signature(function).parameters) - {"self"}
    if inspect.signature(function).return_annotation not in (None, "None"):
        assert documentation["Returns"]
    assert any(line.startswith(">>> ") for line in documentation["Examples"])


@every_class
def test_a_public_class_documents_its_parameters_and_an_example(kind):
    documentation = ClassDoc(kind)
    assert documentation["Summary"]
    if not issubclass(kind, Exception):
        documented = {name.strip() for entry in documentation["Parameters"] for name in entry.name.split(",")}
        assert documented == set(inspect.signature(kind).parameters)
        assert any(line.startswith(">>> ") for line in documentation["Examples"])


@every_function
def test_every_parameter_and_result_of_a_public_function_is_annotated(function):
    signature = inspect.signature(function)
    parameters = [parameter for name, parameter in signature.parameters.items() if name != "self"]
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in parameters)
    assert signature.return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=list(FUNCTIONS))
def test_what_is_no_array_is_passed_by_name(function):
    """At most three arguments come by position, and none that has a default or is a number."""
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            assert parameter.default is inspect.Parameter.empty
            assert parameter.annotation not in ("int", "float", "bool")
