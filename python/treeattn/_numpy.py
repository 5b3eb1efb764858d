"""Plans and tree attention on NumPy arrays, for machines without torch: forward, on the CPU."""

from __future__ import annotations

import ctypes
import math

import numpy

from . import _native
from ._native import FORWARD_PACKER, InvalidArgument, PlanInputs, Shape, check, load

_DTYPES = {"float16": 0, "float32": 2, "float64": 3}


class Plan:
    """Which query rows see which keys of one packed batch. Made by :func:`plan`."""

    def __init__(self, lowering, cu_q, cu_k, a, b, total_q, total_k):
        self.lowering = lowering
        self.cu_seqlens_q, self.cu_seqlens_k = cu_q, cu_k
        self._a, self._b = a, b
        self.total_q, self.total_k = total_q, total_k
        self.batch = cu_q.size - 1
        self._built = {}

    def lists(self, shape_key):
        """Header and buffer of the tile lists for (dtype, heads, heads_kv, dim, dim_v, softcap)."""
        found = self._built.get(shape_key)
        if found is None:
            names = ("dtype", "heads", "heads_kv", "head_dim", "head_dim_v", "softcap")
            shape = Shape(**dict(zip(names, shape_key)))
            engine = _native.engine(_native.CPU)
            header = _native.plan_for(engine, self.total_q, self.total_k, self.batch, [shape])
            buffer = numpy.empty((_native.plan_bytes(header) + 3) // 4, numpy.int32)
            inputs = PlanInputs(
                lowering=self.lowering,
                cu_seqlens_q=self.cu_seqlens_q.ctypes.data,
                cu_seqlens_k=self.cu_seqlens_k.ctypes.data,
            )
            if self.lowering == _native.LOWER_TREE:
                inputs.tree_dfs_order_start_q = self._a.ctypes.data
                inputs.tree_dfs_order_end_k = self._b.ctypes.data
            elif self.lowering == _native.LOWER_INTERVALS:
                inputs.first, inputs.len = self._a.ctypes.data, self._b.ctypes.data
            check(load().treeattn_build_plan(engine, header, inputs, buffer.ctypes.data, None))
            found = self._built[shape_key] = header, buffer
        return found

    def validate(self) -> None:
        """Raises if the arrays are no valid tree; names the first offending token."""
        header, buffer = self.lists((2, 1, 1, 64, 64, 0))
        report = _native.PlanReport()
        engine = _native.engine(_native.CPU)
        check(load().treeattn_validate(engine, header, buffer.ctypes.data, None, report))
        if not report.valid:
            raise InvalidArgument(report.message.decode(errors="replace"))


def ints(name: str, x) -> numpy.ndarray:
    x = numpy.asarray(x)
    if x.ndim != 1 or x.dtype.kind not in "iu":
        raise InvalidArgument(
            f"{name} is {list(x.shape)} of {x.dtype}, expected one dimension of int32"
        )
    return numpy.ascontiguousarray(x, numpy.int32)


def plan(
    cu_seqlens_q, cu_seqlens_k=None, *, total_q=None, total_k=None, tree_dfs_order_start_q=None,
    tree_dfs_order_end_k=None, first=None, length=None, causal=True,
) -> Plan:  # fmt: skip
    """:func:`treeattn.plan` for arrays of NumPy, with the same arguments."""
    arguments = _native.plan_arguments(
        ints, cu_seqlens_q, cu_seqlens_k, total_q, total_k, tree_dfs_order_start_q,
        tree_dfs_order_end_k, first, length, causal,
    )  # fmt: skip
    return Plan(*arguments)


def _readable(name: str, x, tokens: int, like) -> numpy.ndarray:
    if x.ndim != 3 or x.shape[0] != tokens:
        raise InvalidArgument(
            f"{name} is {list(x.shape)}, expected [{tokens}, heads, head_dim] as the plan's tokens"
        )
    if x.dtype != like.dtype:
        raise InvalidArgument(f"{name} is {x.dtype}, expected {like.dtype} as q")
    size = x.itemsize
    if (x.strides[2] != size and x.shape[2] > 1) or any(s % size for s in x.strides):
        return numpy.ascontiguousarray(x)
    return x


def _place(x):
    return x.ctypes.data, x.strides[0] // x.itemsize, x.strides[1] // x.itemsize


def tree_attention(
    q, k, v, plan: Plan, softmax_scale=None, softcap=0.0, deterministic=False, return_lse=False
):
    """:func:`treeattn.tree_attention` for arrays of NumPy: f16, f32 or f64, forward only."""
    q, k, v = (numpy.asarray(x) for x in (q, k, v))
    dtype = _DTYPES.get(q.dtype.name)
    if dtype is None:
        raise InvalidArgument(f"q is {q.dtype}, expected float16, float32 or float64")
    q = _readable("q", q, plan.total_q, q)
    k, v = _readable("k", k, plan.total_k, q), _readable("v", v, plan.total_k, q)
    codes = (dtype, q.shape[1], k.shape[1], q.shape[2], v.shape[2])
    header, buffer = plan.lists((*codes, int(softcap > 0)))
    out = numpy.empty((q.shape[0], q.shape[1], v.shape[2]), q.dtype)
    lse = numpy.empty((q.shape[1], q.shape[0]), numpy.float32)
    scale = 1.0 / math.sqrt(q.shape[2]) if softmax_scale is None else softmax_scale
    packed = FORWARD_PACKER.pack(
        ctypes.sizeof(_native.ForwardArgs), *codes, *_place(q), *_place(k), *_place(v),
        *_place(out), lse.ctypes.data, scale, softcap, ctypes.addressof(header),
        buffer.ctypes.data, 0, 0, 0,
    )  # fmt: skip
    check(load().treeattn_forward(_native.engine(_native.CPU), packed, None))
    return (out, lse) if return_lse else out
