"""Uses one thread: the tensors of these cases are so small that threads would mostly wait for each other."""

import pytest
from helpers import threads


@pytest.fixture(autouse=True)
def _one_thread():
    with threads(1):
        yield
