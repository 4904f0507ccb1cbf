"""What the README and the docstrings say is run."""

import doctest
import re
from pathlib import Path

import pytest

import collins.conversion
import collins.files
import collins.folders
import collins.optimizer

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
CLIENTS = ("accelerate", "lightning", "torchtitan", "transformers")


@pytest.mark.parametrize(
    "module", [collins.optimizer, collins.files, collins.folders, collins.conversion], ids=lambda m: m.__name__
)
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_readme_has_snippets_and_one_for_each_client():
    assert {name for name in CLIENTS for snippet in SNIPPETS if imports(snippet, name)} == set(CLIENTS)


# Lightning's own use of torch, and its advice on loading data.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
# Trainer pins its batches also where there is no accelerator, which torch remarks upon.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")
@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_readme_snippets_run(snippet):
    for name in CLIENTS:
        if imports(snippet, name):
            pytest.importorskip(name)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "README"})


def imports(snippet, name):
    return re.search(rf"^(import|from) {name}\b", snippet, flags=re.MULTILINE) is not None


def test_readme_has_the_two_commands_alone_on_their_lines():
    lines = README.splitlines()
    assert 'pip install -c tests/constraints.txt -e ".[test]" && pytest' in lines
    assert 'pip install -c tests/constraints.txt -e ".[examples]" && python examples/train_lm.py' in lines
