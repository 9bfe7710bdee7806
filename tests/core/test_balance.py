"""The entropy of a load."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tucka
from tucka.core.balance import CollapseAlarm

loads = st.lists(st.integers(0, 100), min_size=1, max_size=6).filter(any)


def entropy(library, load):
    result = tucka.load_entropy(library.from_numpy(np.array(load, dtype=np.float64)))
    assert type(result) is float
    return result


@given(load=loads)
def test_the_entropy_of_a_load_is_that_of_its_shares(library, load):
    shares = np.array([count for count in load if count]) / sum(load)
    desired = 1.0 if len(load) == 1 else -np.sum(shares * np.log(shares)) / np.log(len(load))
    assert entropy(library, load) == pytest.approx(desired, abs=1e-6)


@given(load=loads)
def test_the_entropy_lies_between_collapse_and_balance(library, load):
    assert 0.0 <= entropy(library, load) <= 1.0 + 1e-12


@given(count=st.integers(1, 100), groups=st.integers(2, 6))
def test_equal_counts_are_balanced_and_a_single_one_is_collapsed(library, count, groups):
    assert entropy(library, [count] * groups) == pytest.approx(1.0, abs=1e-12)
    assert entropy(library, [count] + [0] * (groups - 1)) == 0.0


@given(load=loads, scale=st.sampled_from([2.0**-100, 2.0**100]))
def test_the_entropy_depends_on_shares_alone(library, load, scale):
    assert entropy(library, [count * scale for count in load]) == pytest.approx(entropy(library, load), abs=1e-12)


@given(load=loads, data=st.data())
def test_the_order_of_groups_has_no_influence_on_the_entropy(load, data):
    shuffled = data.draw(st.permutations(load))
    assert tucka.load_entropy(shuffled) == pytest.approx(tucka.load_entropy(load), abs=1e-12)


def test_counts_whose_sum_overflows_are_still_balanced():
    assert tucka.load_entropy([1e308, 1e308, 1e308]) == pytest.approx(1.0)


def test_whole_numbers_are_counts_too(library):
    assert tucka.load_entropy(library.from_numpy(np.array([3, 3]))) == 1.0


@pytest.mark.parametrize(("routings", "is_looked_at"), [(7, False), (8, True)])
def test_an_alarm_wants_so_many_routings_for_each_group(routings, is_looked_at):
    alarm = CollapseAlarm("router", window=10)
    alarm.add([routings, 0, 0, 0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        alarm.check(least=2)
    assert bool(caught) is is_looked_at is alarm.has_warned
