"""The example of shared-prompt training runs on the CPU and its runs agree."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
if not os.environ.get("TREEATTN_LIBRARY"):
    pytest.skip("TREEATTN_LIBRARY names no library", allow_module_level=True)

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "python" / "train_shared_prompt.py"


def run(*arguments):
    command = [sys.executable, str(EXAMPLE), "--device", "cpu", "--tiny", "--steps", "2"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("baseline", ["varlen", "sdpa"])
def test_packed_training_has_the_losses_of_unshared_training(baseline):
    done = run("--json", "--baseline", baseline)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    packed, unshared = result["packed"], result["unshared"]
    assert len(packed["losses"]) == len(packed["nlls"]) == 4
    assert packed["nlls"] == pytest.approx(unshared["nlls"], abs=1e-4)
    assert packed["losses"] == pytest.approx(unshared["losses"], abs=1e-4)
    # The second update of a step has another policy than the first, so its loss is not zero.
    assert max(map(abs, packed["losses"][1::2])) > 1e-3
    assert all(a < b for a, b in zip(packed["tokens"], unshared["tokens"]))


def test_the_table_names_both_runs():
    done = run("--max-tokens", "40")
    assert done.returncode == 0, done.stderr
    assert "unshared (varlen)" in done.stdout and "speed-up" in done.stdout
