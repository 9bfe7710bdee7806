"""The structure of the package: what may import what, and what importing it loads. One test for each rule."""

import ast
import io
import sys
import tokenize
from graphlib import TopologicalSorter
from pathlib import Path

import tucka
from support.subprocesses import output_of

PACKAGE = Path(tucka.__file__).parent

# From the bottom up; a module may import its own layer and those below. The longest prefix that fits a module counts.
LAYERS = [
    {"tucka.errors", "tucka._version"},
    {"tucka.checks", "tucka.extras"},
    {"tucka.spec", "tucka.reference"},
    {"tucka.arrays"},
    {"tucka.core"},
    {"tucka.backends.torch"},
    {"tucka.backends.torch.routing"},
    {"tucka.peft"},
    {"tucka.plots", "tucka.cli", "tucka.__main__"},
]
LAYER_OF = {prefix: height for height, prefixes in enumerate(LAYERS) for prefix in prefixes}
# Packages whose own file lists the public names of what is below: it stands on the layer of the highest of them.
FACADES = {
    "tucka": LAYER_OF["tucka.core"],
    "tucka.backends": LAYER_OF["tucka.arrays"],
    "tucka.backends.torch": LAYER_OF["tucka.backends.torch.routing"],
}
# The only ones that may name these libraries in an import.
HEAVY = {"torch", "peft", "transformers", "accelerate", "safetensors"}
MAY_BE_HEAVY = ("tucka.backends.torch", "tucka.peft", "tucka.cli")
# Names of torch, transformers and PEFT that start with an underscore may be used in these files only.
PRIVATE = {
    "tucka.backends.torch.private",
    "tucka.peft.registration",
}


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TEXTS = {module_name(path): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
SOURCES = {name: ast.parse(text) for name, text in TEXTS.items()}


def is_below(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def layer_of(module):
    if module in FACADES:
        return FACADES[module]
    found = [prefix for prefix in LAYER_OF if is_below(module, prefix)]
    return LAYER_OF[max(found, key=len)] if found else None


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


def roots_of(module, *, typing=True):
    return {name.split(".")[0] for name in imports_of(module, typing=typing)}


def docstrings_of(module):
    """The docstring nodes of a module, its classes and its functions."""
    for node in nodes_of(module):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                yield first.value


def code_lines_of(module):
    """The numbers of the lines that hold code: no docstring, comment or blank line."""
    skipped = {line for node in docstrings_of(module) for line in range(node.lineno, node.end_lineno + 1)}
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(TEXTS[module]).readline):
        if token.type not in blank:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - skipped


def test_every_module_has_a_layer():
    assert [name for name in SOURCES if layer_of(name) is None] == []


def test_imports_point_one_way():
    upward = {
        f"{name} -> {other}"
        for name in SOURCES
        for other in imports_of(name)
        if is_below(other, "tucka") and layer_of(other) > layer_of(name)
    }
    assert upward == set()


def test_imports_make_no_circle():
    edges = {name: {other for other in imports_of(name, typing=False) if other in SOURCES} for name in SOURCES}
    order = list(TopologicalSorter(edges).static_order())  # raises CycleError where there is none
    assert order.index("tucka.errors") < order.index("tucka.core.modes") < order.index("tucka")


def test_only_the_layers_of_torch_and_peft_import_them():
    light = [name for name in SOURCES if not any(is_below(name, prefix) for prefix in MAY_BE_HEAVY)]
    assert {name: roots_of(name) & HEAVY for name in light if roots_of(name) & HEAVY} == {}


def test_the_mathematics_needs_numpy_scipy_and_tensorly_alone():
    for module in SOURCES:
        if layer_of(module) <= LAYER_OF["tucka.core"]:
            foreign = roots_of(module, typing=False) - sys.stdlib_module_names - {"tucka"}
            # JAX's backend is imported when the first JAX array is seen.
            allowed = {"numpy", "scipy", "tensorly"} | ({"jax"} if module.startswith("tucka.arrays.") else set())
            assert foreign <= allowed, module


def test_the_reference_imports_only_numpy():
    foreign = roots_of("tucka.reference") - sys.stdlib_module_names
    assert foreign == {"numpy"}


def test_the_core_names_no_array_library_in_its_code():
    """Neither as a name nor in a string that a backend or a dtype is compared with; documentation may."""
    for module in SOURCES:
        if not is_below(module, "tucka.core"):
            continue
        docstrings = {id(node) for node in docstrings_of(module)}
        words = set()
        for node in nodes_of(module):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                words.add(node.value.split(".")[0])
            elif isinstance(node, ast.Name):
                words.add(node.id)
        assert words & {"torch", "pytorch", "jax", "cupy"} == set(), module


SWITCHES = {"set_backend", "backend_context", "initialize_backend", "use_static_dispatch", "use_dynamic_dispatch"}


def test_tensorlys_switches_are_never_touched():
    for module in SOURCES:
        touched = {
            ast.unparse(node)
            for node in nodes_of(module)
            if (isinstance(node, ast.Attribute) and node.attr in SWITCHES)
            or (isinstance(node, ast.ImportFrom) and SWITCHES & {alias.name for alias in node.names})
        }
        # It selects NumPy in a thread of its own that nothing else runs in, and for that thread alone.
        allowed = {"manager.set_backend"} if module == "tucka.core.fitting.tensorly_tucker" else set()
        assert touched <= allowed, module
        for node in nodes_of(module):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in touched:
                assert "local_threadsafe=True" in ast.unparse(node)


def test_jaxs_precision_is_never_switched():
    calls = [ast.unparse(node) for module in SOURCES for node in nodes_of(module) if isinstance(node, ast.Call)]
    assert not any("enable_x64" in call or call.startswith("jax.config") for call in calls)


def test_no_module_is_a_drawer_for_the_rest():
    drawers = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert [module for module in SOURCES if drawers & set(module.split("."))] == []


def test_a_module_fits_into_one_reading():
    assert {module: len(code_lines_of(module)) for module in SOURCES if len(code_lines_of(module)) > 300} == {}


def test_docstrings_are_where_readers_look():
    """At most 30 % of the package's lines are docstrings, at least 55 % are code."""
    total = sum(len(text.splitlines()) for text in TEXTS.values())
    code = sum(len(code_lines_of(module)) for module in SOURCES)
    documented = sum(node.end_lineno - node.lineno + 1 for module in SOURCES for node in docstrings_of(module))
    assert documented <= 0.30 * total
    assert code >= 0.55 * total


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


def own_names():
    """All names that tucka's own functions, classes and attributes have."""
    for module in SOURCES:
        for node in nodes_of(module):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield node.name
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                yield node.attr


def test_what_is_private_to_torch_and_peft_stands_in_one_file_each():
    """A method that a tuner of PEFT's inherits may be called by its name."""
    used, own = set(), set(own_names())
    for module in SOURCES.keys() - PRIVATE:
        for node in nodes_of(module):
            if isinstance(node, ast.Attribute):
                is_own = node.attr in own or (is_below(module, "tucka.peft") and ast.unparse(node.value) == "self")
                name = "" if is_own else node.attr
            else:
                imported = isinstance(node, ast.ImportFrom) and not is_below(node.module, "tucka")
                parts = [*node.module.split("."), *(alias.name for alias in node.names)] if imported else []
                name = next((part for part in parts if part.startswith("_")), "")
            if name.startswith("_") and not name.startswith("__"):
                used.add((module, name))
    assert {(module, name) for module, name in used if name != "__future__"} == set()
