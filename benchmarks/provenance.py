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
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


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
