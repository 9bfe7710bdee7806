"""What the tests with other libraries share. They run in an environment of their own: `make test-clients`."""

import pytest


def pytest_collection_modifyitems(items):
    """All of them are slow, and these libraries warn of many things that are not ours."""
    for item in items:
        if "clients" in item.path.parts:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.filterwarnings("ignore"))
