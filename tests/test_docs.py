"""What the README and the docstrings say is run."""

import doctest
import re
from pathlib import Path

import pytest

import collins.conversion
import collins.files
import collins.optimizer

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


@pytest.mark.parametrize("module", [collins.optimizer, collins.files, collins.conversion], ids=lambda m: m.__name__)
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_readme_snippets_run():
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})


def test_readme_has_the_two_commands_alone_on_their_lines():
    lines = README.splitlines()
    assert 'pip install -c tests/constraints.txt -e ".[test]" && pytest' in lines
    assert 'pip install -c tests/constraints.txt -e ".[examples]" && python examples/train_lm.py' in lines
