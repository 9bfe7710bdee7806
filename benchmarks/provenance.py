"""With which code, versions and device numbers were made; every result file has it."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any


@lru_cache
def commit() -> str | None:
    """Return the commit of the code, marked if there are changes since; None outside a repository."""
    found = _git("rev-parse", "HEAD")
    # The results of an earlier benchmark are no change of the code.
    changed = found and _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results")
    return f"{found}-dirty" if changed else found or None


def _git(*command: str) -> str:
    call = ["git", "-C", str(Path(__file__).parent), *command]
    return subprocess.run(call, capture_output=True, text=True, check=False).stdout.strip()


def short(commit: str | None) -> str:
    """Shorten a commit, and leave its mark."""
    number, *mark = (commit or "unknown").split("-")
    return "-".join([number[:10], *mark])


def provenance(packages: Iterable[str]) -> dict[str, Any]:
    """Gather the versions of Python and of packages, the commit and the device."""
    import torch

    versions = {name: importlib.metadata.version(name) for name in sorted(packages)}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "commit": commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({platform.machine()}, {len(names)} cores)"
