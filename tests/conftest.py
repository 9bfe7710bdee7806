"""Fixtures and hypothesis profiles that all tests share."""

import importlib.util
import os

import pytest
from hypothesis import HealthCheck, settings

from support.array_backends import LIBRARIES, Library

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if importlib.util.find_spec("torch"):
    import torch

    # Tests have one process for each core, and their tensors are too small to share among threads.
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        # torch's own function notes a stack trace for each kind of device that is not there, in a list that grows.
        torch.manual_seed = torch.default_generator.manual_seed

_COMMON = {"deadline": None, "derandomize": bool(os.environ.get("CI")), "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=25, **_COMMON)
settings.register_profile("ci", max_examples=25, **_COMMON)
settings.register_profile("thorough", max_examples=500, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


# Session scope: hypothesis reuses the fixture for all its examples, so it must not be remade between them.
@pytest.fixture(scope="session", params=LIBRARIES, ids=lambda library: library.name)
def library(request) -> Library:
    """Each array library in turn; a test that takes it runs on all of them."""
    return request.param
