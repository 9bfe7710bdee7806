"""Whether tensors have the same numbers as before, whoever changed them and however."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tucka.backends.torch import copies
from tucka.backends.torch.copies import Copies

SHAPES = [(), (3,), (4, 5), (0, 3)]


@pytest.fixture(params=["C's comparison", "torch's"], autouse=True)
def comparison(request, monkeypatch):
    """Each way to compare: some systems have no C library under a known name."""
    if request.param == "torch's":
        monkeypatch.setattr(copies, "_compare", None)
    else:
        assert copies._compare is not None
    return request.param


def tensors():
    return [torch.arange(12.0).reshape(3, 4), torch.ones(()), torch.arange(5, dtype=torch.float64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_unchanged_tensors_are_the_same(shape, dtype):
    one = torch.randn(shape).to(dtype)
    known = Copies([one, one.clone()])
    assert known.are_those_of([one, one])
    assert known.are_those_of([one.clone(), torch.nn.Parameter(one)])


@pytest.mark.parametrize("turned", [False, True])
@given(data=st.data())
def test_one_changed_number_is_found_wherever_it_is(turned, data):
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    one = torch.randn(rows, columns).t() if turned else torch.randn(columns, rows)
    known = Copies([torch.zeros(2), one])
    place = data.draw(st.integers(0, columns - 1)), data.draw(st.integers(0, rows - 1))
    one.data[place] = torch.nextafter(one[place], torch.tensor(9.0))
    assert not known.are_those_of([torch.zeros(2), one])


def _shaped(one):
    one.data = one.data.reshape(4, 3)


def _turned(one):
    one.data = one.data.t()


def _cast(one):
    one.data = one.data.double()


def _longer(one):
    one.data = torch.cat([one.data, one.data])


def _shorter(one):
    one.data = one.data[:2]


@pytest.mark.parametrize("change", [_shaped, _turned, _cast, _longer, _shorter])
def test_another_shape_or_dtype_is_another_tensor(change):
    given_, known = tensors(), Copies(tensors())
    change(given_[0])
    assert not known.are_those_of(given_)


def test_the_same_numbers_at_other_places_are_the_same():
    one = torch.randn(6, 4)
    strided = torch.zeros(6, 8)[:, ::2].copy_(one)
    assert Copies([one]).are_those_of([one.t().contiguous().t()])
    assert Copies([one]).are_those_of([strided])
    assert Copies([strided]).are_those_of([one])


def test_what_copies_hold_does_not_change_with_the_tensors():
    given_ = tensors()
    known = Copies(given_)
    given_[1].data += 1
    assert not known.are_those_of(given_)
    given_[1].data -= 1
    assert known.are_those_of(given_)


def test_no_number_equals_itself_bit_by_bit(comparison):
    one = torch.tensor([float("nan"), 1.0])
    assert Copies([one]).are_those_of([one]) is (comparison == "C's comparison")


def test_tensors_without_numbers_are_never_the_same():
    one = torch.randn(3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        known = Copies([one])
        assert not known.are_those_of([one])
    assert not known.are_those_of([one])


def test_nothing_is_as_it_was():
    assert Copies([]).are_those_of([])
