"""A release as `python -m build` creates it: checked by twine, and installed into a new environment.

Run by name, `pytest tests/release`: it installs torch into a new environment, and takes about three minutes.
"""

import re
import shutil
import sys
import venv

import pytest
from helpers import ROOT, output_of
from test_packaging import ENVIRONMENT, copy_of_the_tree

PLAN = ("plan", "llama-7b", "--device-memory", "24GiB", "--host-memory", "64GiB", "--in-backward")


def new_environment(folder, *requirements):
    """The Python of a new virtual environment with these packages, in the versions of the tests."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    constraints = ROOT / "tests" / "constraints.txt"
    output_of(python, "-m", "pip", "install", "--quiet", "-c", constraints, *requirements, env=ENVIRONMENT)
    return python


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The source distribution and the wheel, checked by twine."""
    target = tmp_path_factory.mktemp("dist")
    python = new_environment(tmp_path_factory.mktemp("build") / "venv", "build", "twine")
    tree = copy_of_the_tree(tmp_path_factory.mktemp("tree"))
    output_of(python, "-m", "build", "--outdir", target, tree, env=ENVIRONMENT)
    output_of(python, "-m", "twine", "check", "--strict", *target.iterdir(), env=ENVIRONMENT)
    return target


@pytest.fixture(scope="module")
def python(distributions, tmp_path_factory):
    """The Python of a new environment with only the wheel and its requirements."""
    (wheel,) = distributions.glob("*.whl")
    return new_environment(tmp_path_factory.mktemp("environment") / "venv", wheel)


def test_a_release_consists_of_a_source_distribution_and_a_pure_python_wheel(distributions):
    assert sorted(path.name.split("-", 2)[2] for path in distributions.glob("*.whl")) == ["py3-none-any.whl"]
    assert len(list(distributions.glob("*.tar.gz"))) == 1


def test_the_readme_s_snippet_runs_from_the_wheel_alone(python, tmp_path):
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "snippet.py").write_text(snippet + "import collins; print(collins.__file__)\n")
    *table, home = output_of(python, "-W", "error", "snippet.py", cwd=tmp_path, env=ENVIRONMENT).splitlines()
    assert "site-packages" in home
    assert table[-1].split()[0] == "total"


def test_the_plan_command_runs_from_the_wheel_alone(python, tmp_path):
    assert "fits" in output_of(python, "-m", "collins", *PLAN, cwd=tmp_path, env=ENVIRONMENT)


def test_the_wheel_installs_its_requirements_and_no_tests(python, tmp_path):
    output_of(python, "-m", "pip", "check", cwd=tmp_path, env=ENVIRONMENT)
    find = "from importlib.util import find_spec as f; print([n for n in ('tests', 'examples', 'compile') if f(n)])"
    assert output_of(python, "-c", find, cwd=tmp_path, env=ENVIRONMENT).strip() == "[]"
    names = "import collins, importlib.metadata as m; print(*m.entry_points(group='llmfoundry_optimizers'))"
    assert "collins:Collins" in output_of(python, "-c", names, cwd=tmp_path, env=ENVIRONMENT)


def test_tests_run_from_the_source_distribution(distributions, tmp_path):
    """The tests find all files that they read, with the packages of this environment."""
    (archive,) = distributions.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tree)}
    output = output_of(
        sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/test_hashing.py", cwd=tree, env=environment
    )
    assert " passed" in output
