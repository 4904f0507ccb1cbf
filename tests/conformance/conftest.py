"""The tensors of these cases are small: threads would wait for one another longer than they compute."""

import pytest
from helpers import threads


@pytest.fixture(autouse=True)
def _one_thread():
    with threads(1):
        yield
