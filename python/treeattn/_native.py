"""The C library: found, opened at first use, its structs and functions declared."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import pathlib
import struct
from ctypes import POINTER, c_char_p, c_double, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p


class TreeAttnError(RuntimeError):
    """What the library refused or failed at: what was wrong, what was expected, what to do next."""


class InvalidArgument(TreeAttnError, ValueError):
    """An argument that the library refuses."""


class Unsupported(TreeAttnError, NotImplementedError):
    """Something that the library does not support on this device or at all."""


_EXCEPTIONS = {1: InvalidArgument, 2: Unsupported, 7: InvalidArgument}

CUDA, CPU = 0, 1
MAX_VIEWS = 8
LOWER_TREE, LOWER_CAUSAL, LOWER_FULL, LOWER_INTERVALS = range(4)


class _Struct(ctypes.Structure):
    """A struct whose first field is its own size."""

    def __init__(self, **fields):
        super().__init__(struct_size=ctypes.sizeof(self), **fields)


class PlanHeader(_Struct):
    _fields_ = [
        ("struct_size", c_uint32),
        ("version", c_uint32),
        ("total_q", c_int32),
        ("total_k", c_int32),
        ("batch", c_int32),
        ("num_views", c_int32),
        ("views", (c_int32 * 2) * MAX_VIEWS),
    ]

    def to_ints(self) -> list[int]:
        """Plain integers, for operators that take nothing else."""
        ints = [self.version, self.total_q, self.total_k, self.batch, self.num_views]
        for view in self.views[: self.num_views]:
            ints += view
        return ints

    @classmethod
    def from_ints(cls, ints) -> PlanHeader:
        header = cls(
            version=ints[0], total_q=ints[1], total_k=ints[2], batch=ints[3], num_views=ints[4]
        )
        for n in range(ints[4]):
            header.views[n][0], header.views[n][1] = ints[5 + 2 * n], ints[6 + 2 * n]
        return header


class Shape(_Struct):
    _fields_ = [
        ("struct_size", c_uint32),
        ("dtype", c_int32),
        ("heads", c_int32),
        ("heads_kv", c_int32),
        ("head_dim", c_int32),
        ("head_dim_v", c_int32),
        ("softcap", c_int32),
        ("backward", c_int32),
    ]


class PlanInputs(_Struct):
    _fields_ = [
        ("struct_size", c_uint32),
        ("lowering", c_int32),
        ("cu_seqlens_q", c_void_p),
        ("cu_seqlens_k", c_void_p),
        ("tree_dfs_order_start_q", c_void_p),
        ("tree_dfs_order_end_k", c_void_p),
        ("first", c_void_p),
        ("len", c_void_p),
    ]


class Tensor(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("token_stride", c_int64), ("head_stride", c_int64)]


_SHAPE_FIELDS = [
    ("struct_size", c_uint32),
    ("dtype", c_int32),
    ("heads", c_int32),
    ("heads_kv", c_int32),
    ("head_dim", c_int32),
    ("head_dim_v", c_int32),
]
_PLAN_FIELDS = [
    ("plan", POINTER(PlanHeader)),
    ("plan_buffer", c_void_p),
    ("workspace", c_void_p),
    ("workspace_bytes", c_size_t),
    ("spec", c_char_p),
]


class ForwardArgs(_Struct):
    _fields_ = [
        *_SHAPE_FIELDS,
        *[(name, Tensor) for name in ("q", "k", "v", "out")],
        ("lse", c_void_p),
        ("softmax_scale", c_double),
        ("softcap", c_double),
        *_PLAN_FIELDS,
    ]


class BackwardArgs(_Struct):
    _fields_ = [
        *_SHAPE_FIELDS,
        *[(name, Tensor) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")],
        ("lse", c_void_p),
        ("dlse", c_void_p),
        ("softmax_scale", c_double),
        ("softcap", c_double),
        ("deterministic", c_int32),
        *_PLAN_FIELDS,
    ]


def _packer(struct_type, tensors: int, extra: str) -> struct.Struct:
    """The same bytes as a struct's, written in one call: a tenth of the cost of its fields."""
    packer = struct.Struct(f"@Iiiiii{'Pqq' * tensors}{extra}PPPNP")
    if packer.size != ctypes.sizeof(struct_type):
        raise ImportError(f"{struct_type.__name__} is laid out in an unexpected way here")
    return packer


FORWARD_PACKER = _packer(ForwardArgs, 4, "Pdd")
BACKWARD_PACKER = _packer(BackwardArgs, 8, "PPddi")


class PlanReport(_Struct):
    _fields_ = [
        ("struct_size", c_uint32),
        ("valid", c_int32),
        ("bad_sequences", c_int32),
        ("first_bad_token", c_int64),
        ("message", ctypes.c_char * 512),
    ]


class Stats(_Struct):
    _fields_ = [
        ("struct_size", c_uint32),
        *[(n, c_uint64) for n in ("launches", "memory_hits", "disk_hits", "compiles", "rejected")],
        ("compile_ms", c_double),
        ("load_ms", c_double),
    ]


class PackOptions(_Struct):
    _fields_ = [("struct_size", c_uint32), ("min_shared", c_int64), ("max_shared", c_void_p)]


_SIGNATURES = {
    "treeattn_engine_create": [c_int32, c_int32, POINTER(c_void_p)],
    "treeattn_engine_description": [c_void_p, c_char_p, c_size_t],
    "treeattn_plan_for": [
        c_void_p, c_int64, c_int64, c_int32, POINTER(Shape), c_size_t, POINTER(PlanHeader),
    ],
    "treeattn_plan_bytes": [POINTER(PlanHeader), POINTER(c_size_t)],
    "treeattn_build_plan": [
        c_void_p, POINTER(PlanHeader), POINTER(PlanInputs), c_void_p, c_void_p,
    ],
    "treeattn_validate": [
        c_void_p, POINTER(PlanHeader), c_void_p, c_void_p, POINTER(PlanReport),
    ],
    "treeattn_forward_workspace_bytes": [
        c_void_p, POINTER(PlanHeader), POINTER(Shape), POINTER(c_size_t),
    ],
    "treeattn_forward": [c_void_p, c_char_p, c_void_p],  # the packed bytes of ForwardArgs
    "treeattn_backward_workspace_bytes": [
        c_void_p, POINTER(PlanHeader), POINTER(Shape), c_int32, POINTER(c_size_t),
    ],
    "treeattn_backward": [c_void_p, c_char_p, c_void_p],  # the packed bytes of BackwardArgs
    "treeattn_prepare": [c_void_p, POINTER(Shape), c_size_t],
    "treeattn_get_stats": [c_void_p, POINTER(Stats)],
    "treeattn_pack_rows_with_options": [
        c_void_p, c_void_p, c_size_t, POINTER(PackOptions), POINTER(c_void_p),
    ],
    "treeattn_packed_size": [c_void_p, POINTER(c_int64), POINTER(c_int64)],
    "treeattn_packed_copy": [c_void_p, *[c_void_p] * 5],
    "treeattn_packed_copy_nodes": [c_void_p, *[c_void_p] * 3],
}  # fmt: skip


def _candidates() -> list[str]:
    named = os.environ.get("TREEATTN_LIBRARY")
    if named:
        return [named]
    here = pathlib.Path(__file__).parent
    return [str(path) for path in sorted(here.glob("lib/libtreeattn.so*"))]


def name_nvrtc() -> None:
    """Names the NVRTC that came with this interpreter's torch, unless the user named one. The
    library itself looks into the environments of the shell, which need not be this one."""
    if os.environ.get("TREEATTN_NVRTC"):
        return
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        for below in ("cu13/lib", "cuda_nvrtc/lib"):
            folder = pathlib.Path(root, below)
            if any(folder.glob("libnvrtc.so.1[23]")):
                os.environ["TREEATTN_NVRTC"] = str(folder)
                return


@functools.cache
def load() -> ctypes.CDLL:
    """The library, opened once a process. ImportError lists what was tried."""
    name_nvrtc()
    tried = []
    for path in _candidates():
        try:
            library = ctypes.CDLL(path)
            break
        except OSError as error:
            tried.append(f"{path}: {error}")
    else:
        places = "; ".join(tried) or "no libtreeattn.so lies in the package"
        raise ImportError(
            f"treeattn's library could not be opened ({places}). Install the package with pip, "
            "or let TREEATTN_LIBRARY name a libtreeattn.so"
        )
    library.treeattn_last_error.restype = c_char_p
    library.treeattn_last_error.argtypes = []
    library.treeattn_engine_destroy.restype = None
    library.treeattn_engine_destroy.argtypes = [c_void_p]
    library.treeattn_packed_destroy.restype = None
    library.treeattn_packed_destroy.argtypes = [c_void_p]
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype = c_int32
        function.argtypes = arguments
    return library


def check(status: int) -> None:
    """Raises what the library says of this thread's last call."""
    if status:
        text = load().treeattn_last_error().decode(errors="replace")
        raise _EXCEPTIONS.get(status, TreeAttnError)(text)


# Handles by kind and device. A child process makes its own: CUDA does not survive a fork.
_engines: dict[tuple[int, int], int] = {}
os.register_at_fork(after_in_child=_engines.clear)


def made_engine(kind: int, device: int = 0) -> int | None:
    return _engines.get((kind, device))


def engine(kind: int, device: int = 0) -> int:
    """The process's engine for the CPU or for a CUDA device, whose primary context is current."""
    made = _engines.get((kind, device))
    if made is None:
        handle = c_void_p()
        check(load().treeattn_engine_create(kind, 0, ctypes.byref(handle)))
        made = _engines[kind, device] = handle.value
    return made


def plan_for(on: int, total_q: int, total_k: int, batch: int, shapes) -> PlanHeader:
    header = PlanHeader()
    array = (Shape * len(shapes))(*shapes)
    check(load().treeattn_plan_for(on, total_q, total_k, batch, array, len(shapes), header))
    return header


def plan_bytes(header: PlanHeader) -> int:
    count = c_size_t()
    check(load().treeattn_plan_bytes(header, ctypes.byref(count)))
    return count.value


def plan_arguments(
    ints, cu_seqlens_q, cu_seqlens_k, total_q, total_k, start_q, end_k, first, length, causal
):
    """Checks what a plan is asked to be made of: lowering, cu_q, cu_k, two arrays and the totals.

    ints(name, x) makes an int32 array or tensor of one dimension of x, or refuses it.
    """
    cu_q = ints("cu_seqlens_q", cu_seqlens_q)
    cu_k = cu_q if cu_seqlens_k is None else ints("cu_seqlens_k", cu_seqlens_k)
    if cu_q.shape != cu_k.shape or cu_q.shape[0] == 0:
        raise InvalidArgument(
            f"cu_seqlens_q has {cu_q.shape[0]} elements and cu_seqlens_k {cu_k.shape[0]}, expected "
            "batch + 1 of both"
        )
    a = b = None
    lowering = LOWER_CAUSAL if causal else LOWER_FULL
    for name_a, given_a, name_b, given_b, code in (
        ("tree_dfs_order_start_q", start_q, "tree_dfs_order_end_k", end_k, LOWER_TREE),
        ("first", first, "length", length, LOWER_INTERVALS),
    ):
        if (given_a is None) != (given_b is None):
            missing = name_a if given_a is None else name_b
            raise InvalidArgument(f"{missing} is missing: expected {name_a} and {name_b} together")
        if given_a is None:
            continue
        if a is not None:
            raise InvalidArgument("a tree and intervals were given, expected one of them")
        a, b, lowering = ints(name_a, given_a), ints(name_b, given_b), code
    if lowering == LOWER_TREE and not causal:
        raise InvalidArgument("causal is False with tree arrays; a tree is causal inside its nodes")
    if lowering == LOWER_INTERVALS and a.shape != b.shape:
        raise InvalidArgument(
            f"first has {a.shape[0]} elements and length {b.shape[0]}, expected as many"
        )

    def total(name, given, cu, array):
        if array is None:
            return int(given) if given is not None else int(cu[-1])
        if given is not None and given != array.shape[0]:
            raise InvalidArgument(f"{name} is {given}, expected {array.shape[0]}, as the arrays")
        return array.shape[0]

    total_q = total("total_q", total_q, cu_q, a if lowering == LOWER_TREE else None)
    return lowering, cu_q, cu_k, a, b, total_q, total("total_k", total_k, cu_k, b)
