"""The C library: found, opened at first use, its structs and functions declared."""

from __future__ import annotations

import ctypes
import functools
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
    return [str(path) for path in sorted(here.glob("lib*/libtreeattn.so*"))]


@functools.cache
def load() -> ctypes.CDLL:
    """The library, opened once a process. ImportError lists what was tried."""
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
