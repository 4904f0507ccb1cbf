"""Counters are set together, and their tensors stay the same objects."""

import pytest

from collins.state import StepCounters, places_of


def test_each_counter_is_a_tensor_that_remains_valid_after_growth():
    counters = StepCounters()
    tensors = [counters.adopt(None, value)[1] for value in range(200)]
    assert [int(t) for t in tensors] == list(range(200))
    counters.set(list(range(200)), counters.read(list(range(200))) + 1)
    assert counters.read(list(range(200))).tolist() == list(range(1, 201))
    assert all(t.shape == () and int(t) == value + 1 for value, t in enumerate(tensors))


def test_some_are_counted_and_others_are_not():
    counters = StepCounters()
    tensors = [counters.adopt(None, 5)[1] for _ in range(4)]
    counters.set([2, 0], counters.read([2, 0]) + 1)
    assert counters.read([2, 0]).tolist() == [6, 6]
    assert [int(t) for t in tensors] == [6, 5, 6, 5]


def test_a_counter_can_be_set_again():
    counters = StepCounters()
    place, tensor = counters.adopt(None, 1)
    assert counters.adopt(place, 9) == (place, tensor)
    counters.set([place], counters.read([place]) + 1)
    assert counters.read_one(place) == int(tensor) == 10


@pytest.mark.parametrize("places", [[0, 1, 2], [2, 3], [3], [0, 2], [3, 1, 2], [1, 0], []])
def test_places_that_follow_one_another_are_a_slice(places):
    counters = StepCounters()
    for value in range(4):
        counters.adopt(None, value)
    found = places_of(places)
    assert isinstance(found, slice) == (places == sorted(places) and places != [0, 2])
    assert counters.read(found).tolist() == places
    counters.set(found, 7)
    assert counters.read(range(4)).tolist() == [7 if value in places else value for value in range(4)]


@pytest.mark.parametrize("places", [[0, 1, 2, 3], [0, 2], [3], [0, 3]])
def test_the_common_value_of_counters(places):
    counters = StepCounters()
    for value in (5, 5, 5, 6):
        counters.adopt(None, value)
    values = {6 if place == 3 else 5 for place in places}
    assert counters.common(places_of(places)) == (values.pop() if len(values) == 1 else None)
