"""Check docstrings: complete ones for the public names, at most one line everywhere else.

Public names are those on the pages of docs/reference/ and in the packages' __all__.

Run: python docs/check_docstrings.py
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpydoc.docscrape import get_doc_object
from numpydoc.validate import validate

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "reference"
PACKAGES = ("tucka", "tucka.backends", "tucka.backends.torch", "tucka.peft", "tucka.plots")
FOLDERS = ("tucka", "examples", "benchmarks")
MODULE_LINES = 3  # of text in a module's docstring, without numbered steps
DIRECTIVE = re.compile(r"^\.\. (currentmodule|autofunction|autoclass|autoexception):: (\S+)")
MEMBERS = re.compile(r"^   :members:\s*(.*)$")

Problem = tuple[str, int, str, str]  # file, line, name, what is wrong


def listed() -> dict[str, list[str] | None]:
    """Read the names on the pages, each with the members that the page shows; None: all members."""
    found: dict[str, list[str] | None] = {}
    for page in sorted(PAGES.glob("*.md")):
        module, name = "", ""
        for line in page.read_text("utf-8").splitlines():
            if match := DIRECTIVE.match(line):
                kind, target = match.groups()
                if kind == "currentmodule":
                    module = target
                else:
                    name = target if target.startswith("tucka.") else f"{module}.{target}"
                    found[name] = []
            elif (match := MEMBERS.match(line)) and name:
                found[name] = [member.strip() for member in match[1].split(",")] if match[1] else None
    return found


def load(name: str) -> Any:
    """Import the object that a full name stands for; None if there is none."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part, None)
        return found
    return None


def is_documented(value: Any) -> bool:
    """Tell whether a value is a function, a method or a class, and no constant or name of a type."""
    return inspect.isroutine(value) or (inspect.isclass(value) and value is not Any) or isinstance(value, property)


def public_names() -> dict[str, Any]:
    """Return all public functions and classes by full name, and the members of classes that a page shows."""
    found: dict[str, Any] = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        found |= {f"{package}.{name}": getattr(module, name) for name in module.__all__}
    for name, members in listed().items():
        value = found[name] = load(name)
        if inspect.isclass(value):
            own = [member for member in vars(value) if not member.startswith("_")] if members is None else members
            found |= {f"{name}.{member}": getattr(value, member, None) for member in own}
    return {name: value for name, value in found.items() if is_documented(value)}


def place(value: Any) -> tuple[str, int, str]:
    """Return file, line and qualified name of an object's definition."""
    value = value.fget if isinstance(value, property) else inspect.unwrap(value)
    path = inspect.getsourcefile(value) or ""
    return str(Path(path).relative_to(ROOT)), inspect.getsourcelines(value)[1], value.__qualname__


def foreign_parameters(value: Any) -> set[str]:
    """Return the parameters that a class inherits from another library, whose pages describe them."""
    found: set[str] = set()
    for base in value.__mro__ if inspect.isclass(value) else ():
        is_foreign = base.__module__.partition(".")[0] not in ("tucka", "builtins")
        found |= set(inspect.signature(base).parameters) if is_foreign else set()
    return found


def incomplete(public: dict[str, Any], checks: set[str]) -> Iterator[Problem]:
    """Validate the docstring of every public name; a member of a class may have one line instead."""
    for name, value in public.items():
        file, line, qualified = place(value)
        if "." in qualified and value.__doc__ and "\n" not in value.__doc__:
            continue
        for code, message in validate(get_doc_object(value))["errors"]:
            own = set(re.findall(r"'(\w+)'", message)) - foreign_parameters(value)
            if code in checks and (code != "PR01" or own):
                yield file, line, qualified, f"{code} {message} ({name})"


def too_long(public: set[tuple[str, str]]) -> Iterator[Problem]:
    """Find docstrings of more than one line outside the public names."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            file = str(path.relative_to(ROOT))
            tree = ast.parse(path.read_text("utf-8"))
            text = ast.get_docstring(tree) or ""
            lines = [line for line in text.splitlines() if line.strip() and not re.match(r"\d+\. |   ", line)]
            # Elsewhere the module's docstring is also the help of a script.
            if folder == "tucka" and len(lines) > MODULE_LINES:
                yield file, 1, "module", f"docstring of {len(lines)} lines; at most {MODULE_LINES} here"
            yield from _long_definitions(file, tree, "", public)


def _long_definitions(file: str, node: ast.AST, prefix: str, public: set[tuple[str, str]]) -> Iterator[Problem]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _long_definitions(file, child, prefix, public)
            continue
        name, text = f"{prefix}{child.name}", ast.get_docstring(child) or ""
        if "\n" in text and (file, name) not in public:
            message = f"docstring of {len(text.splitlines())} lines; at most one outside the public names"
            yield file, child.lineno, name, message
        inner = f"{name}." if isinstance(child, ast.ClassDef) else f"{name}.<locals>."
        yield from _long_definitions(file, child, inner, public)


def main() -> int:
    """Print every problem, and how many each folder has; return the exit code."""
    checks = set(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["numpydoc_validation"]["checks"])
    public = public_names()
    places = {(file, name) for file, _, name in map(place, public.values())}
    problems = sorted([*incomplete(public, checks), *too_long(places)])
    for file, line, name, message in problems:
        print(f"{file}:{line}: {name}: {message}")
    folders = Counter(str(Path(file).parent) for file, *_ in problems)
    for folder, count in sorted(folders.items()):
        print(f"{folder}: {count}")
    print(f"{len(problems)} problems; {len(public)} public names have complete docstrings to keep.")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
