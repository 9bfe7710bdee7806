"""Run a script in a fresh interpreter, where nothing is imported yet."""

import os
import subprocess
import sys
from pathlib import Path


def output_of(script: str, **environment: str) -> str:
    """Return what a script prints; any warning is an error, and any error fails the test."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment}
    command = [sys.executable, "-W", "error", "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout
