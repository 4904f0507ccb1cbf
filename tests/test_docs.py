"""What the README and the docstrings say is run."""

import doctest
import os
import re
import shutil

import pytest
import torch
from clients import component
from helpers import EXAMPLES, ROOT
from ranks import run

import collins.conversion
import collins.files
import collins.folders
import collins.groups
import collins.optimizer

README = (ROOT / "README.md").read_text()
RECIPES = (EXAMPLES / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
TOGETHER = [snippet for snippet in SNIPPETS if "init_process_group" in snippet]
ALONE = [snippet for snippet in SNIPPETS if snippet not in TOGETHER]
ALONE += re.findall(r"```python\n(.*?)```", RECIPES, flags=re.DOTALL)
CONFIGURATIONS = re.findall(r"```yaml\n(.*?)```", RECIPES, flags=re.DOTALL)
CLIENTS = ("accelerate", "lightning", "torchtitan", "transformers", "trl")


@pytest.mark.parametrize(
    "module",
    [collins.optimizer, collins.groups, collins.files, collins.folders, collins.conversion],
    ids=lambda m: m.__name__,
)
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_readmes_have_snippets_and_one_for_each_client():
    assert {name for name in CLIENTS for snippet in ALONE if imports(snippet, name)} == set(CLIENTS)


# Lightning's own use of torch, and its advice on loading data.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
# TRL's own defaults, by a name that transformers has deprecated since.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
# Trainer pins its batches also where there is no accelerator, which torch remarks upon.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")
@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("snippet", ALONE, ids=range(len(ALONE)))
def test_readme_snippets_run(snippet):
    for name in CLIENTS:
        if imports(snippet, name) or imports(snippet, rf"collins\.integrations\.{name}"):
            pytest.importorskip(name)
    execute(snippet)


def optimizer_of(configuration):
    """What a framework imports for a configuration, and the options that it calls it with."""
    chosen = configuration["optimizer"]
    if chosen == "collins":  # axolotl, through transformers
        return collins.Collins, {name: str(value) for name, value in configuration["optim_args"].items()}
    if "class_path" in chosen:
        return component(chosen["class_path"]), chosen["init_args"]
    path = chosen.get("_component_") or chosen.get("_target_")
    options = {name: value for name, value in chosen.items() if name not in ("_component_", "_target_", "name")}
    assert path or chosen["name"] == "collins"
    return component(path) if path else collins.Collins, options


@pytest.mark.parametrize("text", CONFIGURATIONS, ids=range(len(CONFIGURATIONS)))
def test_configurations_name_what_can_be_imported_and_built(text, stand_in):
    configuration = pytest.importorskip("yaml").safe_load(text)
    kind, options = optimizer_of(configuration)
    parameter = torch.nn.Parameter(torch.ones(64, 64))
    opt = kind([parameter], **options)
    parameter.grad = torch.ones(64, 64)
    opt.step()
    assert type(opt) is collins.Collins
    for path in configuration.get("plugins", ()):
        pytest.importorskip("transformers")
        stand_in("axolotl.integrations.base", BasePlugin=object)
        component(path)().register(configuration)


def test_every_framework_names_the_test_that_runs_it():
    frameworks = RECIPES.split("\n## Frameworks\n")[1].split("\n## ")[0]
    for recipe in frameworks.split("\n### ")[1:]:
        named = re.findall(r"`(tests/test_\w+\.py)`", recipe)
        assert named, recipe.splitlines()[0]
        assert all((ROOT / name).is_file() for name in named)


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
