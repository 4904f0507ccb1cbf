"""Counters are set together, and their tensors stay the same objects."""

from collins.state import StepCounters


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
