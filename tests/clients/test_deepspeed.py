"""DeepSpeed's ZeRO on two processes trains what one process without it trains, from the router's start to the files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clients.zero import FILES, SAVED, STEPS

pytest.importorskip("deepspeed")
TESTS = Path(__file__).parents[1]
stages = pytest.mark.parametrize("stage", [1, 2, 3])


def run(*command):
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *command], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train in a stage of ZeRO, each once; stage 0 is one process without DeepSpeed."""
    known = {}

    def train(stage):
        if stage not in known:
            folder = known[stage] = tmp_path_factory.mktemp(f"zero{stage}")
            launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"] if stage else []
            run(*launcher, "clients.zero", str(folder), str(stage))
            if stage:
                run(*launcher, "clients.zero", str(folder), str(stage), "resume")
        return known[stage]

    return train


def found(folder, name="trained"):
    return torch.load(folder / f"{name}.pt", weights_only=False)


def values(history, key):
    return [entry[key] for entry in history if key in entry]


@stages
def test_losses_and_saved_weights_are_those_of_one_process(trained, stage):
    alone, together = found(trained(0)), found(trained(stage))
    losses = values(alone["history"], "loss")
    assert len(losses) == STEPS
    assert values(together["history"], "loss") == pytest.approx(losses, abs=2e-5)
    saved = load_file(trained(0) / "saved" / "adapter_model.safetensors")
    others = load_file(trained(stage) / "saved" / "adapter_model.safetensors")
    assert saved.keys() == others.keys()
    for key, value in saved.items():
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(others[key], value, rtol=0, atol=1e-3 * scale)


@stages
def test_the_routers_start_stays_and_its_drift_is_told(trained, stage):
    alone, together = found(trained(0)), found(trained(stage))
    assert len(together["centroids"]) == 1 + STEPS
    for expected, centroids in zip(alone["centroids"], together["centroids"], strict=True):
        torch.testing.assert_close(centroids, expected, rtol=1e-4, atol=1e-4)
    drift = values(together["history"], "tucka/centroid_drift")
    assert drift == pytest.approx(values(alone["history"], "tucka/centroid_drift"), rel=1e-3)
    assert drift[-1] > 0


def test_cores_start_by_the_weights_that_zero_has_cut(trained):
    for expected, cores in zip(found(trained(0))["cores"], found(trained(3))["cores"], strict=True):
        torch.testing.assert_close(cores, expected, rtol=1e-5, atol=0)


@stages
def test_a_training_that_is_resumed_ends_as_the_whole_one(trained, stage):
    whole, resumed = (found(trained(stage), name) for name in ("trained", "resumed"))
    losses = values(whole["history"], "loss")
    assert values(resumed["history"], "loss")[-(STEPS - SAVED) :] == pytest.approx(losses[SAVED:], abs=1e-6)
    saved, again = (load_file(trained(stage) / name / "adapter_model.safetensors") for name in ("saved", "resumed"))
    for key, value in saved.items():
        torch.testing.assert_close(again[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("what", [["batch"], ["sample"], ["token"], ["sample", "free"]], ids=" ".join)
def test_trl_trains_a_router_with_reentrant_checkpoints(tmp_path, what):
    """TRL switches them on in stage 3; one process without DeepSpeed trains without checkpoints."""
    for name in ("alone", "together"):
        (tmp_path / name).mkdir()
    run("clients.zero", str(tmp_path / "alone"), "0", *what)
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    run(*launcher, "clients.zero", str(tmp_path / "together"), "3", *what)
    alone, together = found(tmp_path / "alone"), found(tmp_path / "together")
    assert (alone["reentrant"], together["reentrant"]) == (None, True)
    losses = values(alone["history"], "loss")
    assert len(losses) == STEPS
    assert values(together["history"], "loss") == pytest.approx(losses, abs=2e-5)
    for expected, centroids in zip(alone["centroids"], together["centroids"], strict=True):
        torch.testing.assert_close(centroids, expected, rtol=0, atol=1e-6)
    assert (alone["centroids"][-1] - alone["centroids"][0]).abs().max() > 2e-4


@pytest.mark.parametrize("stage", [2, 3])
def test_the_documented_files_launch_a_training(tmp_path, stage):
    settings = ["--config_file", str(FILES / f"zero{stage}.yaml"), "--main_process_port", "0"]
    run("accelerate.commands.launch", *settings, "-m", "clients.zero", str(tmp_path), "launched")
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    for result in results:
        assert result["kind"] == ("DeepSpeedEngine", stage, "bf16")
        assert result["losses"][-1] < result["losses"][0]
        assert 0 < result["drift"] < 0.2
