"""What the README and the docstrings say is run."""

import doctest
import os
import re
import shutil
from pathlib import Path

import pytest
from ranks import run

import collins.conversion
import collins.files
import collins.folders
import collins.groups
import collins.optimizer

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
TOGETHER = [snippet for snippet in SNIPPETS if "init_process_group" in snippet]
ALONE = [snippet for snippet in SNIPPETS if snippet not in TOGETHER]
CLIENTS = ("accelerate", "lightning", "torchtitan", "transformers")


@pytest.mark.parametrize(
    "module",
    [collins.optimizer, collins.groups, collins.files, collins.folders, collins.conversion],
    ids=lambda m: m.__name__,
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
@pytest.mark.parametrize("snippet", ALONE, ids=range(len(ALONE)))
def test_readme_snippets_run(snippet):
    for name in CLIENTS:
        if imports(snippet, name):
            pytest.importorskip(name)
    execute(snippet)


def execute(snippet):
    exec(compile(snippet, "README.md", "exec"), {"__name__": "README"})


def run_on_a_rank(rank, folder, snippet):
    os.chdir(folder)
    execute(snippet)


def test_readme_snippets_for_many_ranks_run_on_two(tmp_path):
    ddp, fsdp = TOGETHER
    run(2, run_on_a_rank, str(tmp_path), ddp, folder=tmp_path / "ddp", backend=None, timeout=60)
    assert (tmp_path / "last.pt").exists()
    run(2, run_on_a_rank, str(tmp_path), fsdp, folder=tmp_path / "fsdp", backend=None, timeout=60)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-2", "step-4", "step-6"]
    shutil.rmtree(tmp_path / "step-6")  # as if it had been killed
    run(1, run_on_a_rank, str(tmp_path), fsdp, folder=tmp_path / "again", backend=None, timeout=60)
    assert (tmp_path / "step-6").exists()


def imports(snippet, name):
    return re.search(rf"^(import|from) {name}\b", snippet, flags=re.MULTILINE) is not None


def test_readme_has_the_two_commands_alone_on_their_lines():
    lines = README.splitlines()
    assert 'pip install -c tests/constraints.txt -e ".[test]" && pytest' in lines
    assert 'pip install -c tests/constraints.txt -e ".[examples]" && python examples/train_lm.py' in lines
