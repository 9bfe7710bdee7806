"""Errors: the class, the argument's name, and the key words of rule, value and cure; the wording is free."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def refused(error: type[Exception], name: str, words: str = "") -> Iterator[None]:
    """Assert that the block raises `error` about the argument `name`; `words` are separated by " | "."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert message.startswith(f"{name}: expected "), message
    missing = [word for word in words.split(" | ") if word not in message]
    assert not missing, f"{missing} not in {message!r}"
