"""What is collected where optional packages are missing: the files that import none of them."""

import ast
import functools
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
# What JAX has compiled serves the next run, the other process, and the processes that tests start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Without one of these a file that imports it is left out. Any other import that fails is an error, as it should be.
OPTIONAL = ("torch", "jax", "ml_dtypes", "peft", "transformers", "matplotlib", "typer", "rich", "numpydoc", "yaml")
# A folder without an origin is one of tests/, and not the library of its name.
MISSING = {name for name in OPTIONAL if getattr(importlib.util.find_spec(name), "origin", None) is None}


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out what needs a missing package."""
    path = collection_path / "conftest.py" if collection_path.is_dir() else collection_path
    if not MISSING or path.suffix not in (".py", ".md") or not path.is_file():
        return None
    return True if needed_by(path) & MISSING else None


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Leave out the examples of a page that was named in the configuration, which pytest always collects."""
    if MISSING:
        items[:] = [item for item in items if not (item.path.suffix == ".md" and needed_by(item.path) & MISSING)]


def needed_by(path: Path) -> set[str]:
    """Find the packages that a file imports at once, through other files of this project too."""
    around = [folder / "__init__.py" for folder in path.parents if (folder / "__init__.py").is_file()]
    unseen, seen, found = [path, *around], {path, *around}, set()
    while unseen:
        for name in imports_of(unseen.pop()):
            found.add(name.partition(".")[0])
            files = set(files_of(name)) - seen
            seen |= files
            unseen.extend(files)
    return found


@functools.cache
def imports_of(path: Path) -> set[str]:
    """List what a page's examples or a module import when they run or are imported."""
    return set(_imports_of(path))


def _imports_of(path: Path) -> Iterator[str]:
    if path.suffix == ".md":
        yield from re.findall(r"^(?:>>>|\.\.\.) +(?:from|import) ([\w.]+)", path.read_text("utf-8"), re.MULTILINE)
        return
    unseen: list[ast.AST] = [ast.parse(path.read_text("utf-8"))]
    while unseen:
        node = unseen.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            unseen.extend(node.orelse)
        elif not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            unseen.extend(ast.iter_child_nodes(node))


def files_of(name: str) -> Iterator[Path]:
    """Yield the files of this project that importing a name runs, those of its packages included."""
    parts = name.split(".")
    for start in (ROOT, ROOT / "tests"):
        for length in range(1, len(parts) + 1):
            place = start.joinpath(*parts[:length])
            yield from (file for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file())
