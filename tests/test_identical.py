"""Lists of tensors are compared by identity, and no tensor is compared by its values."""

import numpy as np
import pytest
import torch

from collins.identical import identical, picker

ONE, OTHER = torch.ones(()), torch.ones(())


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ([ONE, OTHER], [ONE, OTHER], True),
        ([ONE, OTHER], [OTHER, ONE], False),
        ([ONE], [ONE, ONE], False),
        ([], [], True),
        ([{"step": ONE, "layout": 5}], [{"step": ONE, "layout": 5}], True),
        ([{"step": ONE, "layout": 5}], [{"step": ONE, "layout": 6}], False),
        ([{"step": ONE}], [{"step": OTHER}], False),
        ([{"step": ONE}], [{"step": ONE, "more": ONE}], False),
        ([{"step": ONE}], [None], False),
        ([None], [None], True),
        ([ONE], [1.0], False),
        ([torch.nn.Parameter(torch.ones(2))], [torch.nn.Parameter(torch.ones(2))], False),
        ([np.ones(2)], [np.ones(2)], False),
        ([torch.ones(1, device="meta")], [torch.ones(1, device="meta")], False),
    ],
)
def test_tensors_are_the_same_only_as_objects(first, second, same):
    assert identical(first, second) is same
    assert (ONE == OTHER).item()  # the mode has ended


@pytest.mark.parametrize("places", [[0], [2], [2, 0], [0, 1, 2]])
def test_a_picker_selects_by_place(places):
    assert list(picker(places)("abc")) == ["abc"[place] for place in places]
