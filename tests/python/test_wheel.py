"""The wheel: built and installed as users do, and used away from the checkout. ctest runs this; by
hand, let TREEATTN_TEST_WHEEL_ROOT name a folder to build in."""

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile

import pytest

pip = pytest.importorskip("pip")
numpy = pytest.importorskip("numpy")
WORK_ROOT = os.environ.get("TREEATTN_TEST_WHEEL_ROOT")
if not WORK_ROOT:
    pytest.skip("TREEATTN_TEST_WHEEL_ROOT names no folder", allow_module_level=True)

ROOT = pathlib.Path(__file__).parents[2]
MAX_BYTES = 3_000_000

USE = """
import importlib.metadata, importlib.util, math, sys
import numpy, treeattn

assert treeattn.__file__.startswith(sys.prefix), treeattn.__file__
assert treeattn.__version__ == importlib.metadata.version("treeattn")
assert importlib.util.find_spec("torch") is None

prompt, *answers = [1, 2, 3], [4, 5], [6, 7, 8]
batch = treeattn.pack([prompt + answer for answer in answers], prompt_lengths=[3, 3])
assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8], batch.input_ids

generator = numpy.random.default_rng(0)
q, k, v = (generator.standard_normal((8, heads, 16)).astype("float32") for heads in (4, 2, 2))
out, lse = treeattn.tree_attention(q, k, v, batch.plan, return_lse=True)
visible = numpy.tril(numpy.ones((8, 8), bool))
visible[5:, 3:5] = False  # the second answer does not see the first
k, v = (x.repeat(2, axis=1) for x in (k, v))
scores = numpy.einsum("qhd,khd->hqk", q, k, dtype="float64") / math.sqrt(16)
weights = numpy.where(visible, numpy.exp(scores), 0)
sums = weights.sum(-1, keepdims=True)
numpy.testing.assert_allclose(out, numpy.einsum("hqk,khd->qhd", weights / sums, v), atol=1e-5)
numpy.testing.assert_allclose(lse, numpy.log(sums[..., 0]), atol=1e-5)
"""


def run(command, folder, **changes):
    """Runs a command without the variables that would lead it back to the checkout."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME", "TREEATTN_LIBRARY")
    }
    return subprocess.run(
        [*map(str, command)], cwd=folder, env={**clean, **changes}, text=True, timeout=840,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def work():
    """A folder of this run's own, so that runs do not disturb each other."""
    with tempfile.TemporaryDirectory(prefix="build-wheel-", dir=WORK_ROOT) as folder:
        yield pathlib.Path(folder)


def pypi_answers(work) -> bool:
    command = (sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir")
    return run([*command, "-d", work / "answer", "scikit-build-core"], work).returncode == 0


@pytest.fixture(scope="module")
def wheel(work):
    # Without a cache nothing is left in it, and no wheel comes from it. ccache shares objects with
    # builds that are as deep below the checkout.
    pip_wheel = (sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-cache-dir")
    built = run(
        [*pip_wheel, "--wheel-dir", work / "dist"], ROOT, SKBUILD_BUILD_DIR=str(work),
        PIP_RETRIES="2",
    )  # fmt: skip
    if built.returncode and not (work / "CMakeCache.txt").exists() and not pypi_answers(work):
        pytest.skip("PyPI, from which pip fetches scikit-build-core, was not reached")
    assert built.returncode == 0, built.stdout
    (file,) = (work / "dist").iterdir()
    return file


@pytest.fixture(scope="module")
def python(work, wheel):
    """A Python that has the wheel and NumPy, not torch."""
    made = run([sys.executable, "-m", "venv", "--without-pip", work / "venv"], work)
    assert made.returncode == 0, made.stdout
    python = work / "venv/bin/python"
    options = ("--no-index", "--no-deps", "--ignore-installed", "--no-compile")
    installed = run([python, pathlib.Path(pip.__file__).parent, "install", *options, wheel], work)
    assert installed.returncode == 0, installed.stdout
    (site_packages,) = (work / "venv/lib").glob("python3*/site-packages")
    numpy_package = pathlib.Path(numpy.__file__).parent
    for package in (numpy_package, numpy_package.with_name("numpy.libs")):
        if package.exists():
            (site_packages / package.name).symlink_to(package)
    return python


def test_its_name_size_and_files(wheel):
    cmake = (ROOT / "CMakeLists.txt").read_text()
    version = re.search(r"project\(treeattn VERSION ([0-9.]+)", cmake)
    assert re.fullmatch(rf"treeattn-{re.escape(version[1])}-py3-none-linux_\w+\.whl", wheel.name)
    assert wheel.stat().st_size < MAX_BYTES
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        library = archive.read("treeattn/lib/libtreeattn.so")
    modules = {f"treeattn/{path.name}" for path in (ROOT / "python/treeattn").glob("*.py")}
    assert names == modules | {"treeattn/lib/libtreeattn.so"}
    assert os.fsencode(ROOT) not in library


def test_it_computes_without_torch(python, work):
    used = run([python, "-c", USE], work)
    assert used.returncode == 0, used.stdout


@pytest.mark.parametrize("command", [("bin/python", "-m", "treeattn"), ("bin/treeattn",)])
def test_its_command_line_says_how_to_get_it(command, python, work):
    """The library alone is built unless more is asked for."""
    venv = python.parents[1]
    said = run([venv / command[0], *command[1:], "--version"], work)
    assert said.returncode == 1 and "TREEATTN_BUILD_CLI=ON" in said.stdout
