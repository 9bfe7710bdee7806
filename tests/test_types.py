"""What a type checker knows of a program that uses tucka: no Any where it matters."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
ROOT = Path(__file__).parent.parent

PROGRAM = """
from typing import assert_type

import numpy as np
import torch
from torch import Tensor, nn

import tucka
from tucka import TuckerExperts, TuckerSpec
from tucka.backends.torch import HouseholderAdapter, Router, TuckerAdapter
from tucka.peft import TuckAConfig, load_adapter


class Mixture(nn.Module):
    def __init__(self, spec: TuckerSpec) -> None:
        super().__init__()
        self.router = Router(spec, in_features=4)
        self.up = TuckerAdapter(nn.Linear(4, 8), spec)
        self.turned = HouseholderAdapter(nn.Linear(8, 8), rank=2)

    def forward(self, x: Tensor) -> Tensor:
        gates = assert_type(self.router(x), Tensor)
        return assert_type(self.turned(assert_type(self.up(x, gates), Tensor)), Tensor)


def size(experts: TuckerExperts) -> int:
    return experts.groups


experts = TuckerExperts(torch.ones(3, 2, 4, 4), torch.ones(5, 2), torch.ones(6, 4))
assert_type(experts.cores, Tensor)
assert_type(experts.to_tensor(0), Tensor)
assert_type(experts.apply(torch.ones(1, 6), torch.ones(3, 5)), Tensor)
assert_type(tucka.compress(experts, rank=2, expert_rank=1).basis, Tensor)
assert_type(tucka.householder_experts(torch.eye(3)).cores, Tensor)
assert_type(TuckerExperts.from_spec(TuckerSpec(), 16, seed=0, like=torch.ones(1)).cores, Tensor)
width: int = size(experts)


arrays = TuckerExperts(np.ones((3, 2, 4, 4)), np.ones((5, 2)), np.ones((6, 4)))
groups, slices, rank, _ = arrays.cores.shape
reveal_type(arrays.cores)
reveal_type(TuckerExperts.from_spec(TuckerSpec(), 16, seed=0).cores)
fitted = tucka.fit_experts(np.ones((2, 3, 3)), rank=2, expert_rank=1)
groups, slices, rank, _ = fitted.cores.shape
reveal_type(fitted.cores)

assert_type(TuckAConfig(r=2).k, int)
load_adapter(nn.Linear(2, 2), "folder").print_trainable_parameters()
"""


def checked(program, folder):
    """Return what mypy says of a program, without what it says of the packages that the program imports."""
    script, settings = folder / "program.py", folder / "mypy.ini"
    script.write_text(program)
    settings.write_text("[mypy]\nignore_missing_imports = true\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(settings), "--cache-dir", str(folder)]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    result = subprocess.run([*command, str(script)], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode in (0, 1), result.stderr
    return [line.partition("program.py:")[2] for line in result.stdout.splitlines() if "program.py:" in line]


def checked_by_pyright(program, folder):
    """Return the errors and the revealed types of Pyright, in its own words."""
    pytest.importorskip("basedpyright")
    (folder / "program.py").write_text(program)
    settings = {"typeCheckingMode": "standard", "include": ["program.py"], "extraPaths": [str(ROOT)]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--project", str(folder), "--pythonpath", sys.executable]
    result = subprocess.run([*command, "--outputjson"], capture_output=True, text=True, check=False)
    assert result.returncode in (0, 1), result.stderr
    said = json.loads(result.stdout)["generalDiagnostics"]
    return {
        level: [each["message"] for each in said if each["severity"] == level] for level in ("error", "information")
    }


@pytest.mark.slow
def test_pyright_knows_the_same_of_a_program(tmp_path):
    said = checked_by_pyright(PROGRAM, tmp_path)
    assert said["error"] == []
    revealed = said["information"]
    assert len(revealed) == 3
    assert [line for line in revealed if not re.search(r'is "(NDArray|ndarray)\[.*float64', line)] == []
    wrong = PROGRAM.replace(
        "assert_type(experts.cores, Tensor)", "assert_type(experts.cores, int)\nexperts.cores.rank()"
    )
    assert len(checked_by_pyright(wrong, tmp_path)["error"]) == 2


@pytest.mark.slow  # mypy reads torch and PEFT first
def test_a_program_is_checked_strictly(tmp_path):
    said = checked(PROGRAM, tmp_path)
    assert [line for line in said if ": error:" in line] == []
    revealed = [line.partition('"')[2] for line in said if "Revealed type" in line]
    assert len(revealed) == 3
    assert [line for line in revealed if not re.match(r"(numpy\.)?ndarray\[.*float64", line)] == []
    # The test notices: what is wrong is found, and the unknown is told from what is known.
    wrong = PROGRAM.replace(
        "assert_type(experts.cores, Tensor)", "assert_type(experts.cores, int)\nexperts.cores.rank()"
    )
    assert sum(": error:" in line for line in checked(wrong, tmp_path)) == 2
