"""The optional packages, and the error that says how to install them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tucka.errors import expected

__all__ = ["PACKAGES", "needs"]

# What the package imports of each extra of pyproject.toml.
PACKAGES = {
    "torch": ("torch",),
    "peft": ("torch", "peft", "transformers", "accelerate", "safetensors", "tqdm"),
    "jax": ("jax", "jaxlib"),
    "plots": ("matplotlib",),
    "cli": ("typer", "rich"),
}


@contextmanager
def needs(extra: str, where: str) -> Iterator[None]:
    """Let an import that fails for the lack of an extra's package, or for its age, name the extra."""
    try:
        yield
    except ImportError as error:
        for reason in _reasons(error):
            package = (reason.name or "").partition(".")[0]
            if package not in PACKAGES[extra]:
                continue
            if isinstance(reason, ModuleNotFoundError) and reason.name == package:
                message = expected(where, f"the package {package}", "none", cure=f"Run: pip install 'tucka[{extra}]'")
                raise ModuleNotFoundError(message, name=package) from error
            cure = f"Run: pip install --upgrade 'tucka[{extra}]'"
            message = expected(where, f"a version of {package} that it knows", str(reason), cure=cure)
            raise ImportError(message, name=package) from error
        raise


def _reasons(error: BaseException | None) -> Iterator[ImportError]:
    """Yield an error and those behind it: transformers raises one of its own, which names no package."""
    while error is not None:
        if isinstance(error, ImportError):
            yield error
        error = error.__cause__ or error.__context__
