"""The READMEs and the docstrings are correct: their snippets are run, their links and tables are checked."""

import doctest
import inspect
import os
import re
import shutil

import pytest
import torch
from clients import component
from helpers import ROOT
from ranks import run

import collins.conversion
import collins.files
import collins.folders
import collins.groups
import collins.optimizer
from collins.formats import NONE
from collins.offload.shapes import llama
from collins.schemes import scheme_under

FOLDERS = ("collins", "compile", "examples", "offload", "tests")
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted([*ROOT.glob("*.md"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.md"))])
}
README, RECIPES = DOCUMENTS["README.md"], DOCUMENTS["examples/README.md"]
MANUAL = DOCUMENTS["collins/README.md"]
SNIPPETS = {
    f"{name}-{number}": snippet
    for name, text in DOCUMENTS.items()
    for number, snippet in enumerate(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
}
TOGETHER = [snippet for snippet in SNIPPETS.values() if "init_process_group" in snippet]
ALONE = {name: snippet for name, snippet in SNIPPETS.items() if snippet not in TOGETHER}
CONFIGURATIONS = re.findall(r"```yaml\n(.*?)```", RECIPES, flags=re.DOTALL)
LLAMA_7B = llama(32, 4096, 11008, 4096, 32000)
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
    assert {f"{name}/README.md" for name in FOLDERS} < DOCUMENTS.keys()
    for name in CLIENTS:
        assert any(imports(snippet, name) or integrates(snippet, name) for snippet in ALONE.values()), name


# Lightning's own use of torch, and its advice on loading data.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
# TRL's own defaults, by a name that transformers has deprecated since.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
# Trainer pins its batches also without an accelerator, of which torch warns.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")
@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("snippet", ALONE.values(), ids=ALONE)
def test_readme_snippets_run(snippet):
    for name in CLIENTS:
        if imports(snippet, name) or integrates(snippet, name):
            pytest.importorskip(name)
    execute(snippet)


def optimizer_of(configuration):
    """The object that a framework imports for a configuration, and the options that it passes."""
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
def test_configurations_can_be_imported_and_built(text, stand_in):
    configuration = pytest.importorskip("yaml").safe_load(text)
    kind, options = optimizer_of(configuration)
    parameter = torch.nn.Parameter(torch.ones(64, 144))
    opt = kind([parameter], **options)
    parameter.grad = torch.ones_like(parameter)
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


def integrates(snippet, name):
    return imports(snippet, rf"collins\.integrations\.{name}")


def anchors(text):
    """The anchors of the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rows(text, heading):
    """The cells of the first table below a heading, without its head."""
    table = re.search(r"\n\|.*?\n\n", text[text.index(f"\n{heading}\n") :], flags=re.DOTALL).group()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_have_existing_targets(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", DOCUMENTS[name]):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_files_exist(name):
    for path in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+\.\w+)`", DOCUMENTS[name]):
        assert (ROOT / path).is_file(), path


def test_the_readme_is_a_page_with_every_option_and_its_default():
    assert len(README.splitlines()) <= 150
    options = inspect.signature(collins.Collins).parameters.values()
    own = {f"`{option.name}`": str(option.default) for option in options if option.kind is option.KEYWORD_ONLY}
    assert {name: default.strip('`"') for name, default, _ in rows(README, "## Options")} == own


def test_the_manual_has_the_formats_of_every_ratio():
    def cell(ratio, role, decode):
        options = {**collins.Collins([torch.nn.Parameter(torch.ones(1))]).defaults, "compress_ratio": ratio}
        scheme = scheme_under((4096, 4096), torch.float32, {**options, "decode": decode}, role, sharded=False)
        moments = ((scheme.m_format, scheme.m.load), (scheme.v_format, scheme.v.load))
        return ", ".join(f"{format} / {load:g}" for format, load in moments if format != NONE)

    params = [(name, torch.nn.Parameter(torch.empty(shape, device="meta"))) for name, shape in LLAMA_7B.parameters()]
    for ratio, *shown in rows(MANUAL, "## Roles and formats"):
        roles = (("matrix", "least_squares"), ("tokens", "least_squares"), ("matrix", "orthogonal"))
        schemes = [cell(int(ratio), *role) for role in roles]
        sizes = [
            collins.Collins(params, compress_ratio=int(ratio), decode=decode).memory_report().state_bytes
            for decode in ("least_squares", "orthogonal")
        ]
        assert shown == [*schemes, *(f"{size / 1e9:.2f} GB" for size in sizes)]


def test_the_changelog_has_this_version_and_dates():
    headings = re.findall(r"^## (.*)$", DOCUMENTS["CHANGELOG.md"], flags=re.MULTILINE)
    assert headings[0].split()[0] == collins.__version__
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ \(\d{4}-\d\d-\d\d\)", heading) for heading in headings)


def test_readme_has_the_two_commands_alone_on_their_lines():
    lines = README.splitlines()
    assert 'pip install -c tests/constraints.txt -e ".[test]" && pytest' in lines
    assert 'pip install -c tests/constraints.txt -e ".[examples]" && python examples/train_lm.py' in lines
