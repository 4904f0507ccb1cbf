"""What the README and the docstrings say is run."""

import doctest
import re
from pathlib import Path

import collins.optimizer

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_docstring_examples():
    result = doctest.testmod(collins.optimizer)
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
