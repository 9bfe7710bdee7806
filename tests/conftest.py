"""Fixtures, hypothesis profiles and marks that all tests share."""

import importlib.util
import os
import zlib

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
settings.register_profile("dev", max_examples=8, **_COMMON)  # others in each run
settings.register_profile("ci", max_examples=25, **_COMMON)
settings.register_profile("all", max_examples=50, **_COMMON)  # of `make test-all`
settings.register_profile("thorough", max_examples=500, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


# Session scope: hypothesis reuses the fixture for all its examples, so it must not be remade between them.
@pytest.fixture(scope="session", params=LIBRARIES, ids=lambda library: library.name)
def library(request) -> Library:
    """Each array library in turn; a test that takes it runs on all of them."""
    return request.param


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Call tests slow that are marked as heavy, and cases that add no new value of a parameter, but in CI."""
    if os.environ.get("CI"):
        return
    for item in items:
        if item.get_closest_marker("heavy"):
            item.add_marker(pytest.mark.slow)
    # In an order of no meaning, the same in all processes, so that values come together in many ways.
    marked = [item for item in items if item.get_closest_marker("each_value")]
    seen = set()
    for item in sorted(marked, key=lambda item: zlib.crc32(item.nodeid.encode())):
        function = item.nodeid.partition("[")[0]
        new = {(function, name, str(value)) for name, value in item.callspec.params.items()} - seen
        seen |= new
        if not new:
            item.add_marker(pytest.mark.slow)
