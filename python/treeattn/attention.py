"""Plans and tree attention on torch tensors."""

from __future__ import annotations

import math

import torch

from . import _engine, _native, _ops
from ._native import InvalidArgument


class Plan:
    """Which query rows see which keys of one packed batch: made once, used by every layer.

    Made by :func:`plan`. Tile lists are built for a shape when it is first met, on the stream that
    is current then, and kept: layers of one model share them. Not to be changed once it is made;
    neither are the arrays that it was made from, until the lists are built.

    Attributes:
        total_q, total_k: packed query and key tokens.
        batch: sequences.
        position_ids: int32 or int64 [total_q], where the maker of the plan knew them, or None.
    """

    def __init__(self, lowering, cu_q, cu_k, a, b, total_q, total_k, position_ids=None):
        self.lowering = lowering
        self.cu_seqlens_q = cu_q
        self.cu_seqlens_k = cu_k
        self._a, self._b = a, b
        self.total_q, self.total_k = total_q, total_k
        self.batch = cu_q.numel() - 1
        self.position_ids = position_ids
        self.device = cu_q.device
        self._built: dict[tuple, _engine.Lists] = {}
        self._fast: dict[tuple, _engine.Lists] = {}  # by the shapes of whole calls, once checked
        self._captured: tuple[int, dict[tuple, _engine.Lists]] = (0, {})
        self._moved: dict[torch.device, Plan] = {}

    def to(self, device=None, non_blocking: bool = False) -> Plan:
        """This plan, or where it is on another device a copy, which is kept: layers of a model
        that is spread over devices ask again and again. As for tensors, None is no device to go
        to; copies always block, for they are kept."""
        if device is None:
            return self
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device == self.device:
            return self
        if device not in self._moved:
            arrays = [
                None if x is None else x.to(device)
                for x in (self.cu_seqlens_q, self.cu_seqlens_k, self._a, self._b, self.position_ids)
            ]
            self._moved[device] = Plan(
                self.lowering, *arrays[:4], self.total_q, self.total_k, arrays[4]
            )
        return self._moved[device]

    def lists(self, q, k, v, softcap: float, backward: bool) -> _engine.Lists:
        """The tile lists that kernels of these tensors need, built on the current stream or
        waited for by it."""
        shape = (q.dtype, q.shape[1], k.shape[1], q.shape[2], v.shape[2], softcap > 0)
        found = self._find(self._built, shape, backward)
        if found is not None:
            found.wait()
            return found
        capture = _engine.capture_id(self.device)
        if capture is None:
            kept = self._built
        else:
            # What a capture builds is made anew by every replay, in the graph's own memory.
            if capture == 0 or self._captured[0] != capture:
                self._captured = (capture, {})
            kept = self._captured[1]
            found = self._find(kept, shape, backward)
            if found is not None and found.stream == _engine.stream_of(self.device):
                return found
        arrays = (self.cu_seqlens_q, self.cu_seqlens_k, self._a, self._b)
        with _engine.outside_of_transforms():
            made = _engine.build_lists(
                q, k, v, softcap, backward, self.total_q, self.total_k, self.lowering, *arrays
            )
        kept[shape, backward] = made
        return made

    @staticmethod
    def _find(kept, shape, backward):
        return kept.get((shape, True)) or (None if backward else kept.get((shape, False)))

    def prepare(
        self, heads: int, heads_kv: int, head_dim: int, head_dim_v: int | None = None,
        dtype: torch.dtype = torch.bfloat16, softcap: bool = False, backward: bool = True,
    ) -> Plan:  # fmt: skip
        """Builds the tile lists for a shape now; compiled regions then find them."""
        like = dict(device=self.device, dtype=dtype)
        q = torch.empty((0, heads, head_dim), **like)
        k = torch.empty((0, heads_kv, head_dim), **like)
        v = torch.empty((0, heads_kv, head_dim_v or head_dim), **like)
        self.lists(q, k, v, 1.0 if softcap else 0.0, backward)
        return self

    def validate(self) -> None:
        """Raises if the arrays are no valid tree; names the first offending token. Synchronises.

        Without it the rows of an invalid tree come out as NaN.
        """
        if not self._built:
            on_cpu = self.device.type == "cpu"
            self.prepare(1, 1, 64, dtype=torch.float32 if on_cpu else torch.bfloat16)
        lists = next(iter(self._built.values()))
        lists.wait()
        _engine.validate(lists)


def _ints(name: str, x, device) -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        x = torch.as_tensor(x, device=device)
    if x.dtype not in (torch.int32, torch.int64) or x.dim() != 1:
        raise InvalidArgument(
            f"{name} is {list(x.shape)} of {x.dtype}, expected one dimension of int32"
        )
    return _engine.unwrapped(x.to(torch.int32).contiguous())


def plan(
    cu_seqlens_q,
    cu_seqlens_k=None,
    *,
    total_q: int | None = None,
    total_k: int | None = None,
    tree_dfs_order_start_q=None,
    tree_dfs_order_end_k=None,
    first=None,
    length=None,
    causal: bool = True,
    position_ids=None,
) -> Plan:
    """Makes a plan of a packed batch. Nothing is synchronised if the totals follow from arrays.

    Args:
        cu_seqlens_q, cu_seqlens_k: int32 [batch + 1], from 0; cu_seqlens_k defaults to the former.
        tree_dfs_order_start_q: int32 [total_q], DFS index of the node each query token belongs to.
        tree_dfs_order_end_k: int32 [total_k], highest DFS index in the subtree of each key's node.
        first, length: int32 [total_k] instead of a tree: key j is seen by the packed query rows
            first[j] .. first[j] + length[j] - 1.
        causal: without tree or intervals, plain causal attention, else full attention.
        total_q, total_k: packed tokens; needed where no array tells and the boundaries are on a
            GPU, since reading them would synchronise.
        position_ids: kept with the plan for the model's sake.

    Raises:
        InvalidArgument: one array of a pair without the other, wrong types or lengths.
    """
    device = cu_seqlens_q.device if isinstance(cu_seqlens_q, torch.Tensor) else None
    arguments = _native.plan_arguments(
        lambda name, x: _ints(name, x, device), cu_seqlens_q, cu_seqlens_k, total_q, total_k,
        tree_dfs_order_start_q, tree_dfs_order_end_k, first, length, causal,
    )  # fmt: skip
    return Plan(*arguments, position_ids)


def _check(name: str, x: torch.Tensor, tokens: int, like: torch.Tensor) -> None:
    if x.dim() != 3 or x.shape[0] != tokens:
        raise InvalidArgument(
            f"{name} is {list(x.shape)}, expected [{tokens}, heads, head_dim] as the plan's tokens"
        )
    if x.dtype != like.dtype or x.device != like.device:
        raise InvalidArgument(
            f"{name} is {x.dtype} on {x.device}, expected {like.dtype} on {like.device} as q"
        )


def _check_call(q, k, v, plan: Plan) -> None:
    _check("q", q, plan.total_q, q)
    _check("k", k, plan.total_k, q)
    _check("v", v, plan.total_k, q)
    if plan.device != q.device:
        raise InvalidArgument(
            f"the plan is on {plan.device} and q on {q.device}; use plan.to({str(q.device)!r})"
        )


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def traced(q, k, v) -> bool:
    """Whether somebody looks on who must see operators: a compiler, a dispatch mode (selective
    checkpointing, FLOP counting, export) or a tensor subclass."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(q) not in _PLAIN
        or type(k) not in _PLAIN
        or type(v) not in _PLAIN
    )


_any_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def autocast(q, k, v):
    """q, k and v in the type of the autocast region that surrounds the call, if one does."""
    if not (torch.compiler.is_compiling() or _any_autocast()):
        return q, k, v
    device = q.device.type
    if not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def scale_of(q, softmax_scale: float | None) -> float:
    return 1.0 / math.sqrt(q.shape[2]) if softmax_scale is None else float(softmax_scale)


def eager(q, k, v, plan: Plan, softmax_scale, softcap, deterministic, return_lse):
    """The way of plain tensors: checks and lookups once a shape, then straight to the library."""
    inside = _engine.transformed()
    needs_grad = inside or (
        torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    )
    key = (
        q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
        softcap > 0, needs_grad,
    )  # fmt: skip
    lists = plan._fast.get(key)
    if lists is None:
        _check_call(q, k, v, plan)
        lists = plan.lists(q, k, v, softcap, needs_grad)
        if lists in plan._built.values():
            plan._fast[key] = lists
    elif lists.cuda:
        lists.wait()
    softmax_scale = scale_of(q, softmax_scale)
    if not needs_grad:
        out, lse = _engine.forward(lists, q, k, v, softmax_scale, softcap)
        return (out, lse) if return_lse else out
    deterministic = bool(deterministic) or torch.are_deterministic_algorithms_enabled()
    call = (lists, softmax_scale, softcap, deterministic, return_lse)
    if inside:
        out, lse = _ops.TransformedAttention.apply(q, k, v, call)
        return (out, lse) if return_lse else out
    return _ops.apply_attention(q, k, v, call)


def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
):
    """softmax(softmax_scale * q k^T, masked as the plan says) v, on a GPU or the CPU executor.

    Args:
        q: [total_q, heads, head_dim], f16 or bf16; on the CPU f32 and f64 too.
        k: [total_k, heads_kv, head_dim]; heads is a multiple of heads_kv.
        v: [total_k, heads_kv, head_dim_v].
        plan: from :func:`plan`.
        softmax_scale: default 1 / sqrt(head_dim).
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
        deterministic: gradients are the same bits in every run; also on where torch's
            deterministic algorithms are.
        return_lse: return (out, lse) with lse [heads, total_q], f32, natural logarithm. Both are
            differentiable.

    NumPy arrays are taken too, for forward on the CPU, and answered with arrays. Under autocast q,
    k and v are cast to its type. Gradients of gradients are refused. A graph captured from this
    call reads the plan whenever it is replayed, so the plan has to be kept.

    Raises:
        InvalidArgument: shapes, types or devices that do not go together.
        Unsupported: a device or head size without kernels.
    """
    if not isinstance(q, torch.Tensor):
        q, k, v = (torch.from_numpy(x) for x in (q, k, v))
        with torch.no_grad():
            result = tree_attention(q, k, v, plan, softmax_scale, softcap, False, return_lse)
        return tuple(x.numpy() for x in result) if return_lse else result.numpy()
    q, k, v = autocast(q, k, v)
    if not traced(q, k, v):
        return eager(q, k, v, plan, softmax_scale, softcap, deterministic, return_lse)
    _check_call(q, k, v, plan)
    numbers = (
        scale_of(q, softmax_scale), float(softcap),
        deterministic or torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    shape = (q.dtype, q.shape[1], k.shape[1], q.shape[2], v.shape[2], softcap > 0)
    lists = plan._built.get((shape, True))
    if lists is not None:
        out, lse = _ops.forward(q, k, v, lists.buffer, lists.ints, *numbers)
    else:
        arrays = (plan.cu_seqlens_q, plan.cu_seqlens_k, plan._a, plan._b, plan.lowering)
        out, lse = _ops.varlen_forward(q, k, v, *arrays, *numbers)
    return (out, lse) if return_lse else out
