"""The structure of the package: what may import what, and what importing it loads."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import tucka
from support.subprocesses import output_of

PACKAGE = Path(tucka.__file__).parent

# From the bottom up; a module may import its own layer and those below. The longest prefix that fits a module counts.
LAYERS = [
    {"tucka.errors", "tucka.spec", "tucka._version"},
    {"tucka.backends"},
    {"tucka.core"},
    {"tucka"},  # the public names of the mathematics
    {"tucka.backends.torch"},
    {"tucka.peft"},
    {"tucka.plots", "tucka.demo", "tucka.cli", "tucka.layer_lists", "tucka.__main__"},
]
LAYER_OF = {prefix: height for height, prefixes in enumerate(LAYERS) for prefix in prefixes}
# The only ones that may name these libraries in an import.
HEAVY = {"torch", "peft", "transformers", "accelerate", "safetensors"}
MAY_BE_HEAVY = ("tucka.backends.torch", "tucka.peft", "tucka.demo", "tucka.cli", "tucka.layer_lists")


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
every_module = pytest.mark.parametrize("module", SOURCES)


def is_below(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def layer_of(module):
    return LAYER_OF[max((prefix for prefix in LAYER_OF if is_below(module, prefix)), key=len)]


def nodes_of(module, *, typing=True):
    """All nodes of a module; those under ``if TYPE_CHECKING``, which never run, only if asked for."""
    unseen = [SOURCES[module]]
    while unseen:
        node = unseen.pop()
        yield node
        if typing or not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            unseen.extend(ast.iter_child_nodes(node))
        else:
            unseen.extend(node.orelse)


def imports_of(module, *, typing=True):
    """All modules that a module imports anywhere, functions included, and by ``import_module`` too."""
    for node in nodes_of(module, typing=typing):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relative to itself"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in SOURCES else node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"}:
                yield node.args[0].value


def roots_of(module):
    return {name.split(".")[0] for name in imports_of(module)}


def test_every_module_has_a_layer():
    # The root's layer is for the public names alone: a new top-level module must be given one of its own.
    unplaced = [name for name in SOURCES if name != "tucka" and layer_of(name) == LAYER_OF["tucka"]]
    assert unplaced == []


@every_module
def test_imports_point_one_way(module):
    own = [name for name in imports_of(module) if is_below(name, "tucka")]
    upward = [name for name in own if layer_of(name) > layer_of(module)]
    assert upward == []


def test_imports_make_no_circle():
    edges = {name: {other for other in imports_of(name, typing=False) if other in SOURCES} for name in SOURCES}
    order = list(TopologicalSorter(edges).static_order())  # raises CycleError where there is none
    assert order.index("tucka.errors") < order.index("tucka.core.modes") < order.index("tucka")


@every_module
def test_only_the_layers_of_torch_and_peft_import_them(module):
    if not any(is_below(module, prefix) for prefix in MAY_BE_HEAVY):
        assert roots_of(module) & HEAVY == set()


@pytest.mark.parametrize("module", [name for name in SOURCES if layer_of(name) <= LAYER_OF["tucka"]])
def test_the_mathematics_needs_numpy_and_tensorly_alone(module):
    foreign = roots_of(module) - sys.stdlib_module_names - {"tucka"}
    # JAX's backend is imported when the first JAX array is seen.
    allowed = {"numpy", "scipy", "tensorly"} | ({"jax"} if module.startswith("tucka.backends.") else set())
    assert foreign <= allowed


def test_the_reference_imports_only_numpy():
    foreign = roots_of("tucka.backends.reference") - sys.stdlib_module_names
    assert foreign == {"numpy"}


@pytest.mark.parametrize("module", [module for module in SOURCES if is_below(module, "tucka.core")])
def test_the_core_names_no_array_library_in_its_code(module):
    """Neither as a name nor in a string that a backend or a dtype is compared with; documentation may."""
    docstrings = {
        id(node.body[0].value)
        for node in nodes_of(module)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and isinstance(node.body[0], ast.Expr)
    }
    words = set()
    for node in nodes_of(module):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            words.add(node.value.split(".")[0])
        elif isinstance(node, ast.Name):
            words.add(node.id)
    assert words & {"torch", "pytorch", "jax", "cupy"} == set()


SWITCHES = {"set_backend", "backend_context", "initialize_backend", "use_static_dispatch", "use_dynamic_dispatch"}


@every_module
def test_tensorlys_switches_are_never_touched(module):
    touched = {
        ast.unparse(node)
        for node in nodes_of(module)
        if (isinstance(node, ast.Attribute) and node.attr in SWITCHES)
        or (isinstance(node, ast.ImportFrom) and SWITCHES & {alias.name for alias in node.names})
    }
    # It selects NumPy in a thread of its own that nothing else runs in, and for that thread alone.
    assert touched <= ({"manager.set_backend"} if module == "tucka.core.tensorly_tucker" else set())
    for node in nodes_of(module):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in touched:
            assert "local_threadsafe=True" in ast.unparse(node)


@every_module
def test_jaxs_precision_is_never_switched(module):
    calls = [ast.unparse(node) for node in nodes_of(module) if isinstance(node, ast.Call)]
    assert not any("enable_x64" in call or call.startswith("jax.config") for call in calls)


@every_module
def test_no_module_is_a_drawer_for_the_rest(module):
    assert set(module.split(".")) & {"utils", "util", "helpers", "helper", "misc", "common"} == set()


@every_module
def test_a_module_fits_into_one_reading(module):
    path = PACKAGE.parent.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert len(path.read_text("utf-8").splitlines()) <= 400


HEAVY_IMPORTS = """
import sys, tucka
print(sorted({"torch", "jax", "jaxlib", "peft", "transformers", "matplotlib", "tensorly"} & sys.modules.keys()))
"""


def test_importing_tucka_loads_no_heavy_library():
    assert output_of(HEAVY_IMPORTS) == "[]\n"


NO_OTHER_LIBRARY = """
import sys
for name in ("torch", "jax", "jaxlib", "peft", "transformers", "matplotlib", "cupy"):
    sys.modules[name] = None  # as if it were not installed
import numpy as np, tucka
experts = tucka.householder_experts(np.eye(3)[:, :2])
print(experts.apply(np.ones((1, 3)), np.ones((1, 1))))
"""


def test_numpy_arrays_need_no_other_library():
    assert output_of(NO_OTHER_LIBRARY) == "[[-1. -1.  1.]]\n"
