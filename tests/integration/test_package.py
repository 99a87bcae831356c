"""What is built for PyPI: everything that yopo needs, and nothing else."""

import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return the folder with a wheel and an sdist, built of what git knows."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_wheel_holds_the_package_with_its_data_and_types_and_no_tests(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"yopo/py.typed", "yopo/embedded/model/model.safetensors"} <= names
    source = ROOT / "src"
    modules = {str(file.relative_to(source)) for file in (source / "yopo").rglob("*.py")}
    tasks = {str(f.relative_to(source)) for f in (source / "yopo/evaluation/local").glob("*.yaml")}
    assert modules | tasks <= names
    assert tasks
    assert all(name.startswith(("yopo/", "yopo_prune-")) for name in names)


def test_a_plain_install_brings_no_extra(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        (name,) = [n for n in file.namelist() if n.endswith(".dist-info/METADATA")]
        told = Parser().parsestr(file.read(name).decode())
    needed = [line for line in told.get_all("Requires-Dist") if "extra ==" not in line]
    brought = {line.split(">")[0] for line in needed}
    assert brought == {"numpy", "safetensors", "torch", "transformers", "typing-extensions"}
    assert set(told.get_all("Provides-Extra")) == {"all", "eval", "plot", "recover"}
    assert told["License-Expression"] == "Apache-2.0"


def test_the_sdist_holds_what_a_wheel_is_built_of(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "src/yopo/py.typed"} <= names
