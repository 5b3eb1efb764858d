"""Tensors in, library calls out: engines, streams, plans and passes. Imports torch.

Every microsecond here is paid once a layer, so what depends on shapes alone is kept in Lists, and
a call's arguments are packed as bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools

import torch

from . import _native
from ._native import BACKWARD_PACKER, FORWARD_PACKER, PlanHeader, PlanInputs, Shape, check, load

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


def engine_of(device: torch.device) -> int:
    """The engine of a tensor's device; a CUDA engine takes that device's primary context."""
    if device.type == "cpu":
        return _native.made_engine(_native.CPU) or _native.engine(_native.CPU)
    if device.type != "cuda":
        raise _native.Unsupported(f"the tensors are on {device}, expected cuda or cpu")
    index = device.index if device.index is not None else torch.cuda.current_device()
    made = _native.made_engine(_native.CUDA, index)
    if made is not None:
        return made
    with torch.cuda.device(index):
        torch.cuda.current_stream().query()  # makes the primary context current
        return _native.engine(_native.CUDA, index)


def _raw_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


# torch.cuda.current_stream makes an object of it.
raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _raw_stream)


def stream_of(device: torch.device) -> int | None:
    """The caller's current stream as a pointer; None on the CPU."""
    if device.type != "cuda":
        return None
    return raw_stream(device.index if device.index is not None else torch.cuda.current_device())


def unwrapped(x: torch.Tensor) -> torch.Tensor:
    """What a torch.func transform wrapped, because made inside of it; has memory to read."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            raise _native.Unsupported(
                "an array of a tree is batched by vmap, which has no rule for it; pack the batch "
                "into one call, with a sequence of cu_seqlens for each of its trees"
            )
        x = functorch.get_unwrapped(x)
    return x


def transformed() -> bool:
    """Whether a transform of torch.func (grad, jvp, vmap) is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def outside_of_transforms():
    """A context in which what is made is memory, not a value of the transforms that are running."""
    if not transformed():
        return contextlib.nullcontext()
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


def capturing(x: torch.Tensor) -> bool:
    """Whether what is queued for x now becomes part of a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


@functools.cache
def _capture_info():
    try:
        return ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return None


def capture_id(device: torch.device) -> int | None:
    """A number for the graph capture of the current stream, 0 where nobody can tell which of them
    it is; None outside of a capture."""
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return None
    ask = _capture_info()
    if ask is None:
        return 0
    status, number = ctypes.c_int(), ctypes.c_uint64()
    failed = ask(
        ctypes.c_void_p(stream_of(device)), ctypes.byref(status), ctypes.byref(number),
        None, None, None,
    )  # fmt: skip
    return 0 if failed else number.value


class Lists:
    """The tile lists of a plan for tensors of one shape, and what a launch needs of them."""

    __slots__ = (
        "ints", "header", "address", "buffer", "pointer", "shape", "codes", "device", "cuda",
        "index", "key", "stream", "event", "out_like", "lse_like", "forward_bytes",
        "backward_bytes",
    )  # fmt: skip

    def __init__(self, header: PlanHeader, buffer: torch.Tensor, shape: Shape, dtype: torch.dtype):
        self.ints = header.to_ints()
        self.header = header
        self.address = ctypes.addressof(header)
        self.buffer = buffer
        self.pointer = buffer.data_ptr()
        self.shape = shape
        self.codes = (
            ctypes.sizeof(_native.ForwardArgs), shape.dtype, shape.heads, shape.heads_kv,
            shape.head_dim, shape.head_dim_v,
        )  # fmt: skip
        self.device = buffer.device
        self.cuda = buffer.is_cuda
        self.index = buffer.get_device() if self.cuda else 0
        self.key = (_native.CUDA if self.cuda else _native.CPU, self.index)
        self.stream = self.event = None
        # Making an output like an expanded number takes half the time of naming shape and type.
        one = torch.empty((), dtype=dtype, device=self.device)
        self.out_like = one.expand(header.total_q, shape.heads, shape.head_dim_v)
        one = torch.empty((), dtype=torch.float32, device=self.device)
        self.lse_like = one.expand(shape.heads, header.total_q)
        self.forward_bytes = None
        self.backward_bytes = {}

    def engine(self) -> int:
        return _native._engines.get(self.key) or engine_of(self.device)

    def mark(self) -> None:
        """To be called where the buffer was built: later users on other streams wait for it."""
        if self.cuda:
            stream = torch.cuda.current_stream(self.index)
            self.event = torch.cuda.Event()
            self.event.record(stream)
            self.stream = stream.cuda_stream

    def wait(self) -> None:
        """Orders the current stream behind the building of the buffer."""
        if self.event is None or raw_stream(self.index) == self.stream:
            return
        stream = torch.cuda.current_stream(self.index)
        if not torch.cuda.is_current_stream_capturing():
            stream.wait_event(self.event)
        self.buffer.record_stream(stream)

    def _count(self, function, *arguments) -> int:
        count = ctypes.c_size_t()
        check(function(self.engine(), self.header, self.shape, *arguments, ctypes.byref(count)))
        return count.value

    def forward_workspace(self) -> torch.Tensor | None:
        if self.forward_bytes is None:
            self.forward_bytes = self._count(load().treeattn_forward_workspace_bytes)
        if self.forward_bytes == 0:
            return None
        return torch.empty(self.forward_bytes, dtype=torch.uint8, device=self.device)

    def backward_workspace(self, deterministic: bool) -> torch.Tensor:
        count = self.backward_bytes.get(deterministic)
        if count is None:
            ask = load().treeattn_backward_workspace_bytes
            count = self.backward_bytes[deterministic] = self._count(ask, deterministic)
        return torch.empty(count, dtype=torch.uint8, device=self.device)


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


@torch.inference_mode(False)  # lists built by an evaluation serve training too
def build_lists(
    q, k, v, softcap: float, backward: bool, total_q: int, total_k: int, lowering: int, cu_q, cu_k,
    a, b,
) -> Lists:  # fmt: skip
    """Builds a plan for tensors of these shapes on the current stream. a and b are start_q and
    end_k of a tree, or first and len of intervals."""
    device = cu_q.device
    engine = engine_of(device)
    shape = shape_struct(q, k, v, softcap, backward)
    header = _native.plan_for(engine, total_q, total_k, cu_q.numel() - 1, [shape])
    buffer = torch.empty(
        (_native.plan_bytes(header) + 3) // 4, dtype=torch.int32, device=device
    )
    inputs = PlanInputs(lowering=lowering, cu_seqlens_q=cu_q.data_ptr(), cu_seqlens_k=cu_k.data_ptr())
    if lowering == _native.LOWER_TREE:
        inputs.tree_dfs_order_start_q, inputs.tree_dfs_order_end_k = a.data_ptr(), b.data_ptr()
    elif lowering == _native.LOWER_INTERVALS:
        inputs.first, inputs.len = a.data_ptr(), b.data_ptr()
    check(
        load().treeattn_build_plan(engine, header, inputs, buffer.data_ptr(), stream_of(device))
    )
    lists = Lists(header, buffer, shape, q.dtype)
    lists.mark()
    return lists


def lists_of(buffer, header_ints, q, k, v, softcap: float, backward: bool) -> Lists:
    """Lists again from what an operator carries of them: a tensor and integers."""
    header = PlanHeader.from_ints(header_ints)
    return Lists(header, buffer, shape_struct(q, k, v, softcap, backward), q.dtype)


def validate(lists: Lists) -> None:
    """Raises if the plan's arrays were no valid tree. Synchronises the current stream."""
    report = _native.PlanReport()
    check(
        load().treeattn_validate(
            lists.engine(), lists.header, lists.pointer, stream_of(lists.device), report
        )
    )
    if not report.valid:
        raise _native.InvalidArgument(report.message.decode(errors="replace"))


def _readable(x: torch.Tensor, cuda: bool) -> tuple[torch.Tensor, int, int, int]:
    """x, or a copy where the kernels cannot read it, with its pointer and strides. Kernels ask for
    a contiguous last dimension, and on a GPU for pointers and strides in multiples of 16 bytes."""
    pointer = x.data_ptr()
    token, head, last = x.stride()
    if (last == 1 or x.shape[2] <= 1) and not (
        cuda and (pointer | (token | head) * x.element_size()) % _ALIGN_BYTES
    ):
        return x, pointer, token, head
    x = x.clone(memory_format=torch.contiguous_format)
    token, head, _ = x.stride()
    return x, x.data_ptr(), token, head


def _spread(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where its tokens or heads share memory, as in the gradient of a sum: Hopper's
    kernels read no such tensor."""
    return x.contiguous() if 0 in x.stride() else x


def forward(lists: Lists, q, k, v, softmax_scale: float, softcap: float):
    """out [total_q, heads, head_dim_v] and lse [heads, total_q] f32."""
    cuda = lists.cuda
    q, q_at, q_token, q_head = _readable(q, cuda)
    k, k_at, k_token, k_head = _readable(k, cuda)
    v, v_at, v_token, v_head = _readable(v, cuda)
    out = torch.empty_like(lists.out_like)
    lse = torch.empty_like(lists.lse_like)
    workspace = None if lists.forward_bytes == 0 else lists.forward_workspace()
    out_token, out_head, _ = out.stride()
    packed = FORWARD_PACKER.pack(
        *lists.codes,
        q_at, q_token, q_head,
        k_at, k_token, k_head,
        v_at, v_token, v_head,
        out.data_ptr(), out_token, out_head,
        lse.data_ptr(), softmax_scale, softcap,
        lists.address, lists.pointer,
        0 if workspace is None else workspace.data_ptr(), lists.forward_bytes, 0,
    )  # fmt: skip
    status = load().treeattn_forward(
        lists.engine(), packed, raw_stream(lists.index) if cuda else None
    )
    if status:
        check(status)
    return out, lse


def backward(
    lists: Lists, dout, dlse, q, k, v, out, lse, softmax_scale: float, softcap: float,
    deterministic: bool,
):  # fmt: skip
    """dq, dk and dv; dlse may be None."""
    cuda = lists.cuda
    places = [_readable(x, cuda) for x in (q, k, v, out, _spread(dout))]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    places += [(x, x.data_ptr(), x.stride(0), x.stride(1)) for x in (dq, dk, dv)]
    if dlse is not None:
        dlse = dlse.float().contiguous()
    workspace = lists.backward_workspace(deterministic)
    packed = BACKWARD_PACKER.pack(
        ctypes.sizeof(_native.BackwardArgs), *lists.codes[1:],
        *[number for place in places for number in place[1:]],
        lse.data_ptr(), 0 if dlse is None else dlse.data_ptr(),
        softmax_scale, softcap, deterministic,
        lists.address, lists.pointer, workspace.data_ptr(), workspace.numel(), 0,
    )  # fmt: skip
    check(
        load().treeattn_backward(
            lists.engine(), packed, raw_stream(lists.index) if cuda else None
        )
    )
    return dq, dk, dv
