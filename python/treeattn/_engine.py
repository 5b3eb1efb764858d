"""Tensors in, library calls out: engines, streams, plans and passes. Imports torch."""

from __future__ import annotations

import ctypes

import torch

from . import _native
from ._native import BackwardArgs, ForwardArgs, PlanHeader, PlanInputs, Shape, Tensor, check, load

_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
_ALIGN_BYTES = 16


def dtype_code(dtype: torch.dtype) -> int:
    code = _DTYPES.get(dtype)
    if code is None:
        raise _native.InvalidArgument(
            f"dtype is {dtype}, expected torch.float16 or torch.bfloat16 (on the CPU float32 and "
            "float64 too)"
        )
    return code


def engine_of(device: torch.device) -> ctypes.c_void_p:
    """The engine of a tensor's device; a CUDA engine takes that device's primary context."""
    if device.type == "cpu":
        return _native.engine(_native.CPU)
    if device.type != "cuda":
        raise _native.Unsupported(f"the tensors are on {device}, expected cuda or cpu")
    index = device.index if device.index is not None else torch.cuda.current_device()
    made = _native.made_engine(_native.CUDA, index)
    if made is not None:
        return made
    with torch.cuda.device(index):
        torch.cuda.current_stream().query()  # makes the primary context current
        return _native.engine(_native.CUDA, index)


def stream_of(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return torch.cuda.current_stream(device).cuda_stream


def usable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where the kernels cannot read it: they ask for a contiguous last dimension,
    and on a GPU for pointers and strides that are multiples of 16 bytes."""
    if x.stride(2) != 1 and x.shape[2] > 1:
        return x.contiguous()
    if x.device.type == "cuda":
        elements = _ALIGN_BYTES // x.element_size()
        if x.data_ptr() % _ALIGN_BYTES or x.stride(0) % elements or x.stride(1) % elements:
            return x.clone(memory_format=torch.contiguous_format)
    return x


def _tensor(x: torch.Tensor) -> Tensor:
    return Tensor(x.data_ptr(), x.stride(0), x.stride(1))


def _pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def shape_struct(q, k, v, softcap: float, backward: bool) -> Shape:
    return Shape(
        dtype=dtype_code(q.dtype),
        heads=q.shape[1],
        heads_kv=k.shape[1],
        head_dim=q.shape[2],
        head_dim_v=v.shape[2],
        softcap=softcap > 0,
        backward=backward,
    )


def plan_header(device, total_q: int, total_k: int, batch: int, shape: Shape) -> list[int]:
    """The plan's header as integers: what tile lists a plan for these shapes holds."""
    return _native.plan_for(engine_of(device), total_q, total_k, batch, [shape]).to_ints()


def build_plan(header: list[int], lowering: int, cu_q, cu_k, a, b) -> torch.Tensor:
    """The plan's buffer, made on the current stream. a and b are start_q and end_k of a tree, or
    first and len of intervals."""
    struct = PlanHeader.from_ints(header)
    device = cu_q.device
    buffer = torch.empty(
        (_native.plan_bytes(struct) + 3) // 4, dtype=torch.int32, device=device
    )
    tree = lowering == _native.LOWER_TREE
    intervals = lowering == _native.LOWER_INTERVALS
    inputs = PlanInputs(
        lowering=lowering,
        cu_seqlens_q=_pointer(cu_q),
        cu_seqlens_k=_pointer(cu_k),
        tree_dfs_order_start_q=_pointer(a) if tree else None,
        tree_dfs_order_end_k=_pointer(b) if tree else None,
        first=_pointer(a) if intervals else None,
        len=_pointer(b) if intervals else None,
    )
    check(
        load().treeattn_build_plan(
            engine_of(device), struct, inputs, buffer.data_ptr(), stream_of(device)
        )
    )
    return buffer


def validate(header: list[int], buffer: torch.Tensor) -> _native.PlanReport:
    report = _native.PlanReport()
    device = buffer.device
    check(
        load().treeattn_validate(
            engine_of(device),
            PlanHeader.from_ints(header),
            buffer.data_ptr(),
            stream_of(device),
            report,
        )
    )
    return report


def forward(q, k, v, buffer, header, softmax_scale: float, softcap: float):
    """out [total_q, heads, head_dim_v] and lse [heads, total_q] f32."""
    q, k, v = usable(q), usable(k), usable(v)
    heads = q.shape[1]
    out = q.new_empty((q.shape[0], heads, v.shape[2]))
    lse = q.new_empty((heads, q.shape[0]), dtype=torch.float32)
    args = ForwardArgs(
        dtype=dtype_code(q.dtype),
        heads=heads,
        heads_kv=k.shape[1],
        head_dim=q.shape[2],
        head_dim_v=v.shape[2],
        q=_tensor(q),
        k=_tensor(k),
        v=_tensor(v),
        out=_tensor(out),
        lse=lse.data_ptr(),
        softmax_scale=softmax_scale,
        softcap=softcap,
        plan=ctypes.pointer(PlanHeader.from_ints(header)),
        plan_buffer=buffer.data_ptr(),
    )
    check(load().treeattn_forward(engine_of(q.device), args, stream_of(q.device)))
    return out, lse


def backward(
    dout, dlse, q, k, v, out, lse, buffer, header, softmax_scale: float, softcap: float,
    deterministic: bool,
):  # fmt: skip
    """dq, dk and dv; dlse may be None."""
    q, k, v, out, dout = usable(q), usable(k), usable(v), usable(out), usable(dout)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if dlse is not None:
        dlse = dlse.float().contiguous()
    on = engine_of(q.device)
    struct = PlanHeader.from_ints(header)
    shape = shape_struct(q, k, v, softcap, True)
    count = ctypes.c_size_t()
    check(
        load().treeattn_backward_workspace_bytes(
            on, struct, shape, deterministic, ctypes.byref(count)
        )
    )
    workspace = torch.empty(count.value, dtype=torch.uint8, device=q.device)
    args = BackwardArgs(
        dtype=shape.dtype,
        heads=shape.heads,
        heads_kv=shape.heads_kv,
        head_dim=shape.head_dim,
        head_dim_v=shape.head_dim_v,
        q=_tensor(q),
        k=_tensor(k),
        v=_tensor(v),
        out=_tensor(out),
        dout=_tensor(dout),
        dq=_tensor(dq),
        dk=_tensor(dk),
        dv=_tensor(dv),
        lse=lse.data_ptr(),
        dlse=_pointer(dlse),
        softmax_scale=softmax_scale,
        softcap=softcap,
        deterministic=deterministic,
        plan=ctypes.pointer(struct),
        plan_buffer=buffer.data_ptr(),
        workspace=workspace.data_ptr(),
        workspace_bytes=count.value,
    )
    check(load().treeattn_backward(on, args, stream_of(q.device)))
    return dq, dk, dv
