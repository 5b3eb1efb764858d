"""The layer under the tensors: layouts, errors, NumPy without torch, child processes."""

import ctypes
import math
import os
import subprocess
import sys

import pytest

if not os.environ.get("TREEATTN_LIBRARY"):
    pytest.skip("TREEATTN_LIBRARY names no library", allow_module_level=True)

import treeattn  # noqa: E402
from treeattn import _native  # noqa: E402


def numbers_of(value):
    """The numbers in a struct, field by field, structs inside of it unfolded."""
    for name, kind in value._fields_:
        field = getattr(value, name)
        if isinstance(field, ctypes.Structure):
            yield from numbers_of(field)
        elif isinstance(field, ctypes._Pointer):
            yield ctypes.cast(field, ctypes.c_void_p).value
        elif kind is ctypes.c_char_p:
            yield ctypes.cast(field, ctypes.c_void_p).value
        else:
            yield field


@pytest.mark.parametrize("name", ["Forward", "Backward"])
def test_packed_arguments_are_the_structs_bytes(name):
    struct = getattr(_native, f"{name}Args")
    packer = getattr(_native, f"{name.upper()}_PACKER")
    sample = struct()
    total = len(list(numbers_of(sample)))
    wanted = list(range(1, total))
    wanted.append(0)  # spec is a string: none
    packed = packer.pack(*wanted)
    assert list(numbers_of(struct.from_buffer_copy(packed)))[:-1] == wanted[:-1]


def test_errors_say_what_was_wrong_and_what_was_expected():
    shape = _native.Shape(dtype=2, heads=3, heads_kv=2, head_dim=16)
    with pytest.raises(treeattn.InvalidArgument, match="heads.*3") as caught:
        _native.plan_for(_native.engine(_native.CPU), 4, 4, 1, [shape])
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, treeattn.TreeAttnError)


def run(code, **environment):
    """Runs code in a Python of its own; its output."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_missing_library_is_named():
    out = run(
        "import treeattn\n"
        "try: treeattn._native.load()\n"
        "except ImportError as error: print(error)",
        TREEATTN_LIBRARY="/nowhere/libtreeattn.so",
    )
    assert "/nowhere/libtreeattn.so" in out and "TREEATTN_LIBRARY" in out


def test_the_package_and_numpy_arrays_need_no_torch():
    pytest.importorskip("numpy")
    out = run(
        "import sys; sys.modules['torch'] = None\n"
        "import importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        "import treeattn, numpy\n"
        "random = numpy.random.default_rng(0)\n"
        "q, k, v = random.standard_normal((3, 7, 2, 16))\n"
        "start, end = [0, 0, 0, 1, 1, 2, 2], [2, 2, 2, 1, 1, 2, 2]\n"
        "plan = treeattn.plan([0, 7], tree_dfs_order_start_q=start, tree_dfs_order_end_k=end)\n"
        "plan.validate()\n"
        "out, lse = treeattn.tree_attention(q, k[:, :1], v[:, :1], plan, return_lse=True)\n"
        "at, start, end = numpy.arange(7), numpy.array(start), numpy.array(end)\n"
        "seen = (at[None] <= at[:, None]) & (start[:, None] <= end[None])\n"
        "for head in range(2):\n"
        "    scores = numpy.where(seen, q[:, head] @ k[:, 0].T / 4, -numpy.inf)\n"
        "    weights = numpy.exp(scores)\n"
        "    numpy.testing.assert_allclose(lse[head], numpy.log(weights.sum(1)), rtol=1e-5)\n"
        "    weights /= weights.sum(1, keepdims=True)\n"
        "    numpy.testing.assert_allclose(out[:, head], weights @ v[:, 0], rtol=1e-6, atol=1e-9)\n"
        "try: treeattn.tree_attention(q[:3], k, v, plan)\n"
        "except treeattn.InvalidArgument as error: print(error)\n"
        "try: treeattn.flash_attn_varlen_func\n"
        "except ImportError: print('no torch')\n"
    )
    assert "q is [3, 2, 16], expected [7, heads, head_dim]" in out and "no torch" in out


def test_numpy_arrays_beside_torch():
    numpy = pytest.importorskip("numpy")
    pytest.importorskip("torch")
    plan = treeattn.plan([0, 2])
    q = numpy.zeros((2, 1, 16), numpy.float32)
    v = numpy.arange(32, dtype=numpy.float32).reshape(2, 1, 16)
    out, lse = treeattn.tree_attention(q, q, v, plan, return_lse=True)
    assert isinstance(out, numpy.ndarray)
    numpy.testing.assert_allclose(out[0], v[0])
    numpy.testing.assert_allclose(out[1, 0], v.mean(0)[0])
    numpy.testing.assert_allclose(lse, [[0.0, math.log(2)]], atol=1e-6)


def test_a_forked_child_computes_with_an_engine_of_its_own():
    torch = pytest.importorskip("torch")
    plan = treeattn.plan([0, 2])
    q = torch.randn(2, 1, 16)
    expected = treeattn.tree_attention(q, q, q, plan)
    mine = _native.engine(_native.CPU)
    child = os.fork()
    if child == 0:
        os._exit(
            0
            if not _native._engines
            and torch.equal(treeattn.tree_attention(q, q, q, plan), expected)
            and _native._engines
            else 1
        )
    assert os.waitpid(child, 0)[1] == 0
    assert _native.engine(_native.CPU) == mine


def test_the_nvrtc_of_this_interpreter_is_named_unless_the_user_named_one(tmp_path):
    folder = tmp_path / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    (folder / "libnvrtc.so.13").touch()
    show = "import treeattn, os; treeattn._native.load(); print(os.environ['TREEATTN_NVRTC'])"
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    assert str(folder) in run(show, PYTHONPATH=path, TREEATTN_NVRTC="")
    assert "/mine" in run(show, PYTHONPATH=path, TREEATTN_NVRTC="/mine")
