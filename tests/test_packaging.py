"""What a wheel and an editable install put where."""

import importlib.metadata
import os
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, output_of

import collins
from collins import Collins

# From each folder in a process of its own, as Python starts there with -c; torch is imported once for all of them.
IMPORTS = """
import importlib.util, os, sys, torch
from pathlib import Path
assert "collins" not in sys.modules
for folder in sys.argv[1:]:
    if os.fork() == 0:
        os.chdir(folder)
        import collins.compile, collins.offload
        home = Path(collins.__file__).parent
        if (home / "compile").is_dir():
            assert all(type(finder).__name__ != "SourceTreeFinder" for finder in sys.meta_path)
        else:
            home = home.parent
        assert [collins.compile.__file__, collins.offload.__file__] == [
            str(home / room / "__init__.py") for room in ("compile", "offload")
        ]
        for name in ("tests", "examples", "collins", "pyproject"):
            assert importlib.util.find_spec("collins." + name) is None, name
        print(collins.__file__, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the checkout, so that building leaves nothing there."""
    copy = tmp_path_factory.mktemp("tree")
    names = ("collins", "compile", "examples", "offload", "tests", "pyproject.toml", "README.md", "LICENSE")
    output_of("cp", "-R", *(ROOT / name for name in names), copy)
    return copy


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    target = tmp_path_factory.mktemp("wheel")
    output_of(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", target, tree)
    (path,) = target.glob("collins_optim-*.whl")
    return path


@pytest.fixture
def environment(tmp_path):
    """A new virtual environment that sees this one's packages, but not its install of Collins."""
    venv.create(tmp_path / "venv", with_pip=False)
    (site,) = (tmp_path / "venv" / "lib").glob("*/site-packages")
    # A path in a .pth file is searched, but the .pth files there, an editable install of Collins, are not read.
    (site / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return tmp_path / "venv" / "bin" / "python", site


def install(python, *what):
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation")
    output_of(*pip, "--ignore-installed", *what)


def found_from(python, *folders, **options):
    """The file that is imported as `collins` from each folder, with both rooms of its tree and nothing else of it."""
    return output_of(python, "-c", IMPORTS, *folders, cwd=folders[0], **options).splitlines()


def test_a_wheel_has_one_top_level_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"collins"}
    modules = ("optimizer.py", "compile/engine.py", "offload/memory.py", "integrations/transformers.py")
    for expected in ("py.typed", "__main__.py", *modules):
        assert f"collins/{expected}" in names
    assert {Path(name).suffix for name in names if ".dist-info" not in name} == {".py", ".typed"}  # no READMEs


def test_the_wheel_states_name_licence_and_needs(wheel):
    files = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in files.namelist() if name.endswith("METADATA"))
    lines = files.read(metadata).decode().splitlines()
    for line in (
        "Name: collins-optim",
        f"Version: {collins.__version__}",
        "License-Expression: MIT",
        "License-File: LICENSE",
        "Requires-Dist: torch>=2.9",
        "Requires-Dist: numpy",
        "Requires-Dist: psutil",
        "Provides-Extra: test",
        "Provides-Extra: examples",
    ):
        assert line in lines


def test_llm_foundry_finds_the_optimizer_by_its_name(wheel):
    """Its registry is one of `catalogue`, which loads such entry points (0.22.0: llmfoundry/registry.py, line 109)."""
    (distribution,) = importlib.metadata.distributions(path=[str(wheel)])  # a wheel is searched as a folder is
    (found,) = distribution.entry_points.select(group="llmfoundry_optimizers")
    assert found.name == "collins"
    assert found.load() is Collins


def test_installed_it_imports_from_any_folder(wheel, environment, tmp_path):
    python, site = environment
    install(python, wheel)
    assert {path.name for path in site.iterdir()} >= {"collins"}
    assert not {"compile", "offload"} & {path.name for path in site.iterdir()}
    *anywhere, here = found_from(python, tmp_path, Path("/"), site, ROOT)
    assert anywhere == [str(site / "collins" / "__init__.py")] * 3
    # In a source tree Python finds that tree first; its rooms stand beside it.
    assert here == str(ROOT / "collins" / "__init__.py")


def test_editable_it_imports_from_any_folder(tree, environment, tmp_path):
    python, site = environment
    install(python, "--editable", tree)
    assert not {"compile", "offload"} & {path.name for path in site.iterdir()}
    *anywhere, here = found_from(python, tmp_path, Path("/"), tree, tree / "compile", ROOT)
    assert anywhere == [str(tree / "collins" / "__init__.py")] * 4
    assert here == str(ROOT / "collins" / "__init__.py")  # and not with the rooms of the installed tree
    for name in ("compile", "offload"):
        found = output_of(
            python, "-c", f"import importlib.util; print(importlib.util.find_spec({name!r}))", cwd=tmp_path
        )
        assert found.strip() == "None"


def test_a_source_tree_imports_without_an_install(tree, environment, tmp_path):
    python, _ = environment
    options = {"env": {**os.environ, "PYTHONPATH": str(tree)}}
    anywhere = found_from(python, tmp_path, Path("/"), tree, tree / "compile", **options)
    assert anywhere == [str(tree / "collins" / "__init__.py")] * 4
    assert "usage: python -m collins plan" in output_of(
        python, "-m", "collins", "plan", "--help", cwd=tmp_path, **options
    )
