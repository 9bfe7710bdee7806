"""PEFT's own tests for custom models, from the source of the installed version, with TuckA in their tables."""

import os
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest

from clients.peft_suite import write_suite

pytest.importorskip("diffusers")  # the suite imports it
TESTS = Path(__file__).parents[1]
CHOSEN = "(TestPeftCustomModel or TestMultipleActiveAdapters or TestPeftFsdpStateDict) and TuckAConfig"


def test_all_tests_of_peft_pass(tmp_path):
    """`make test-clients` unpacks the source distribution, and names it in PEFT_SOURCE."""
    source = os.environ.get("PEFT_SOURCE")
    if source is None:
        pytest.skip("Set PEFT_SOURCE to the source distribution of the installed PEFT")
    assert f"\nVersion: {peft.__version__}\n" in (Path(source) / "PKG-INFO").read_text("utf-8")
    file = write_suite(Path(source) / "tests", tmp_path)
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        # The plugin is what `clients` imports first, too: torchvision may be there for timm.
        [sys.executable, "-m", "pytest", "-q", "-p", "clients", f"--rootdir={tmp_path}", str(file), "-k", CHOSEN],
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path, capture_output=True, text=True, timeout=3000,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 1000
