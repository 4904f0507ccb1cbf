"""The contents and the metadata of the source distribution and the wheel, and imports from every kind of install.

`tests/release` installs the wheel alone into a new environment.
"""

import importlib.metadata
import os
import re
import shutil
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, output_of

import collins
from collins import Collins

# In one process per folder, as Python starts there with -c; torch is imported once for all of them.
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
            str(home / name / "__init__.py") for name in ("compile", "offload")
        ]
        for name in ("tests", "examples", "collins", "pyproject"):
            assert importlib.util.find_spec("collins." + name) is None, name
        print(collins.__file__, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
FOLDERS = (".ci", "collins", "compile", "examples", "offload", "tests")
FILES = ("CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml")


def copy_of_the_tree(target):
    """Copies the checkout without compiled code."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, target)
    return target


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the checkout, so that building leaves nothing there."""
    return copy_of_the_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    """The source distribution."""
    target = tmp_path_factory.mktemp("sdist")
    build = "import sys, setuptools.build_meta as backend; print(backend.build_sdist(sys.argv[1]))"
    *_, name = output_of(sys.executable, "-c", build, target, cwd=tree).split()
    return target / name


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel, built from the source distribution as `python -m build` does."""
    target = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    output_of(*pip, "--wheel-dir", target, sdist)
    (path,) = target.glob("collins_optim-*.whl")
    return path


@pytest.fixture
def environment(tmp_path):
    """A new virtual environment with access to the packages of this one, except its install of Collins."""
    venv.create(tmp_path / "venv", with_pip=False)
    (site,) = (tmp_path / "venv" / "lib").glob("*/site-packages")
    # A path in a .pth file is searched, but the .pth files there, an editable install of Collins, are not read.
    (site / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return tmp_path / "venv" / "bin" / "python", site


def install(python, *packages):
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation")
    output_of(*pip, "--ignore-installed", *packages)


def imported_files(python, *folders, **options):
    """The file that is imported as `collins` from each folder, with both subpackages of its tree and nothing else."""
    options.setdefault("env", ENVIRONMENT)
    return output_of(python, "-c", IMPORTS, *folders, cwd=folders[0], **options).splitlines()


def files_in(folder):
    """The files below a folder, without compiled code, by relative path."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if "__pycache__" not in path.parts}


def test_the_wheel_contains_only_the_packages(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    homes = {"collins": "collins/", "compile": "collins/compile/", "offload": "collins/offload/"}
    modules = {
        home + name for folder, home in homes.items() for name in files_in(ROOT / folder) if name.endswith(".py")
    }
    assert {name for name in names if ".dist-info/" not in name} == {*modules, "collins/py.typed"}
    assert {name.split("/", 1)[1] for name in names if ".dist-info/" in name} == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt",
    }  # fmt: skip


def test_the_source_distribution_contains_all_files_of_the_tests(sdist):
    with tarfile.open(sdist) as archive:
        names = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    assert {name for name in names if ".egg-info/" not in name} == {
        *(f"{folder}/{name}" for folder in FOLDERS for name in files_in(ROOT / folder)),
        *FILES,
        *("PKG-INFO", "setup.cfg"),  # written by setuptools
    }


def metadata(wheel):
    files = zipfile.ZipFile(wheel)
    (name,) = (name for name in files.namelist() if name.endswith("METADATA"))
    return files.read(name).decode()


def test_the_wheel_declares_name_licence_and_requirements(wheel):
    lines = metadata(wheel).splitlines()
    for line in (
        "Name: collins-optim",
        f"Version: {collins.__version__}",
        "License-Expression: MIT",
        "License-File: LICENSE",
        "Requires-Python: >=3.11",
        *(f"Classifier: Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13, 14)),
        "Requires-Dist: torch>=2.9",
        "Requires-Dist: numpy",
        "Requires-Dist: psutil",
    ):
        assert line in lines
    assert sum(line.startswith("Requires-Dist:") and "extra ==" not in line for line in lines) == 3


def test_the_wheel_s_description_is_the_readme_and_lists_the_extras(wheel):
    head, _, description = metadata(wheel).partition("\n\n")
    assert "Description-Content-Type: text/markdown" in head.splitlines()
    readme = (ROOT / "README.md").read_text()
    assert description.strip() == readme.strip()
    extras = set(re.findall(r"^Provides-Extra: (.*)$", head, re.MULTILINE))
    (extras_line,) = re.findall(r"^Extras: (.*?)\.$", readme, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`([a-z]+)`", extras_line)) == extras


def test_llm_foundry_finds_the_optimizer_by_its_name(wheel):
    """Its registry is one of `catalogue`, which loads such entry points (0.22.0: llmfoundry/registry.py, line 109)."""
    (distribution,) = importlib.metadata.distributions(path=[str(wheel)])  # a wheel is searched as a folder is
    (entry_point,) = distribution.entry_points.select(group="llmfoundry_optimizers")
    assert entry_point.name == "collins"
    assert entry_point.load() is Collins


def test_an_installed_wheel_imports_from_any_folder(wheel, environment, tmp_path):
    python, site = environment
    install(python, wheel)
    assert {path.name for path in site.iterdir()} >= {"collins"}
    assert not {"compile", "offload"} & {path.name for path in site.iterdir()}
    *from_others, from_checkout = imported_files(python, tmp_path, Path("/"), site, ROOT)
    assert from_others == [str(site / "collins" / "__init__.py")] * 3
    # In a source tree Python finds that tree first; which has the subpackages beside it.
    assert from_checkout == str(ROOT / "collins" / "__init__.py")


def test_an_editable_install_imports_from_any_folder(tree, environment, tmp_path):
    python, site = environment
    install(python, "--editable", tree)
    assert not {"compile", "offload"} & {path.name for path in site.iterdir()}
    *from_others, from_checkout = imported_files(python, tmp_path, Path("/"), tree, tree / "compile", ROOT)
    assert from_others == [str(tree / "collins" / "__init__.py")] * 4
    assert from_checkout == str(ROOT / "collins" / "__init__.py")  # and not with the subpackages of the installed tree
    for name in ("compile", "offload"):
        find = f"import importlib.util; print(importlib.util.find_spec({name!r}))"
        spec = output_of(python, "-c", find, cwd=tmp_path, env=ENVIRONMENT)
        assert spec.strip() == "None"


def test_a_source_tree_imports_without_an_install(tree, environment, tmp_path):
    python, _ = environment
    options = {"env": {**os.environ, "PYTHONPATH": str(tree)}}
    from_others = imported_files(python, tmp_path, Path("/"), tree, tree / "compile", **options)
    assert from_others == [str(tree / "collins" / "__init__.py")] * 4
    assert "usage: python -m collins plan" in output_of(
        python, "-m", "collins", "plan", "--help", cwd=tmp_path, **options
    )
