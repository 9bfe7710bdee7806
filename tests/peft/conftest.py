"""Settings and fixtures for tests of the PEFT method."""

import json

import pytest
import torch
from safetensors.torch import load_file

from support.adapter_files import CONFIG, WEIGHTS, trained

# Tiny tensors: a second thread only waits, and for very long where test processes share the cores.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A good adapter: its folder, its tensors, its configuration's entries."""
    folder = tmp_path_factory.mktemp("good")
    trained().save_pretrained(folder)
    return folder, load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """One folder that examples write their damaged files to."""
    return tmp_path_factory.mktemp("damaged")
