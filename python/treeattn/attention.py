"""Plans and tree attention on torch tensors."""

from __future__ import annotations

import math
import weakref

import torch

from . import _engine, _native, _ops
from ._native import InvalidArgument

_live_plans: weakref.WeakSet[Plan] = weakref.WeakSet()


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
        self._built: dict[tuple, tuple[list[int], torch.Tensor, object]] = {}
        _live_plans.add(self)

    @property
    def device(self) -> torch.device:
        return self.cu_seqlens_q.device

    def to(self, device) -> Plan:
        """The same plan with its arrays on another device."""
        moved = [
            None if x is None else x.to(device)
            for x in (self.cu_seqlens_q, self.cu_seqlens_k, self._a, self._b, self.position_ids)
        ]
        return Plan(self.lowering, *moved[:4], self.total_q, self.total_k, moved[4])

    def lists(self, q, k, v, softcap: float, backward: bool) -> tuple[list[int], torch.Tensor]:
        """Header and buffer of the tile lists that kernels of these tensors need."""
        shape = (q.dtype, k.shape[1], q.shape[1], q.shape[2], v.shape[2], softcap > 0)
        if torch.compiler.is_compiling():
            # Inside a graph plans are values: what is built there stays there.
            found = self._built.get((shape, True)) or self._built.get((shape, backward))
            return found[:2] if found else self._build(q, k, v, softcap, backward, compiled=True)
        capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
        found = self._built.get((shape, True)) or self._built.get((shape, backward))
        if found is None:
            header, buffer = self._build(q, k, v, softcap, backward, compiled=False)
            if not capturing:
                # What a capture builds is made anew by every replay, in the graph's own memory.
                self._built[shape, backward] = header, buffer, _mark(buffer)
            return header, buffer
        header, buffer, mark = found
        _after(mark, buffer)
        return header, buffer

    def _build(self, q, k, v, softcap, backward, compiled):
        shape = _engine.shape_struct(q, k, v, softcap, backward)
        header = _engine.plan_header(q.device, self.total_q, self.total_k, self.batch, shape)
        arrays = (self.cu_seqlens_q, self.cu_seqlens_k, self._a, self._b)
        if compiled:
            return header, _ops.build_plan(*arrays, self.lowering, header)
        return header, _engine.build_plan(header, self.lowering, *arrays)

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
        header, buffer, mark = next(iter(self._built.values()))
        _after(mark, buffer)
        report = _engine.validate(header, buffer)
        if not report.valid:
            raise InvalidArgument(report.message.decode(errors="replace"))


def _mark(buffer: torch.Tensor):
    """What later users of the buffer on other streams must wait for."""
    if not buffer.is_cuda:
        return None
    stream = torch.cuda.current_stream(buffer.device)
    event = torch.cuda.Event()
    event.record(stream)
    return stream.cuda_stream, event


def _after(mark, buffer: torch.Tensor) -> None:
    if mark is None:
        return
    stream = torch.cuda.current_stream(buffer.device)
    if stream.cuda_stream == mark[0]:
        return
    if not torch.cuda.is_current_stream_capturing():
        stream.wait_event(mark[1])
    buffer.record_stream(stream)


def _ints(name: str, x, device) -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        x = torch.as_tensor(x, device=device)
    if x.dtype not in (torch.int32, torch.int64) or x.dim() != 1:
        raise InvalidArgument(
            f"{name} is {list(x.shape)} of {x.dtype}, expected one dimension of int32"
        )
    return x.to(torch.int32).contiguous()


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
    cu_q = _ints("cu_seqlens_q", cu_seqlens_q, device)
    cu_k = cu_q if cu_seqlens_k is None else _ints("cu_seqlens_k", cu_seqlens_k, device)
    if cu_q.numel() != cu_k.numel() or cu_q.numel() == 0:
        raise InvalidArgument(
            f"cu_seqlens_q has {cu_q.numel()} elements and cu_seqlens_k {cu_k.numel()}, expected "
            "batch + 1 of both"
        )
    a = b = None
    pairs = (
        ("tree_dfs_order_start_q", tree_dfs_order_start_q, "tree_dfs_order_end_k",
         tree_dfs_order_end_k, _native.LOWER_TREE),
        ("first", first, "length", length, _native.LOWER_INTERVALS),
    )  # fmt: skip
    lowering = _native.LOWER_CAUSAL if causal else _native.LOWER_FULL
    for name_a, given_a, name_b, given_b, code in pairs:
        if (given_a is None) != (given_b is None):
            missing = name_a if given_a is None else name_b
            raise InvalidArgument(f"{missing} is missing: expected {name_a} and {name_b} together")
        if given_a is None:
            continue
        if a is not None:
            raise InvalidArgument("a tree and intervals were given, expected one of them")
        a, b, lowering = _ints(name_a, given_a, device), _ints(name_b, given_b, device), code
    if lowering == _native.LOWER_TREE and not causal:
        raise InvalidArgument("causal is False with tree arrays; a tree is causal inside its nodes")

    def total(name, given, cu, array):
        if array is not None:
            if given is not None and given != array.numel():
                raise InvalidArgument(f"{name} is {given}, expected {array.numel()}, as the arrays")
            return array.numel()
        return int(given) if given is not None else int(cu[-1])

    tree_a = a if lowering == _native.LOWER_TREE else None
    return Plan(
        lowering, cu_q, cu_k, a, b, total("total_q", total_q, cu_q, tree_a),
        total("total_k", total_k, cu_k, b), position_ids,
    )  # fmt: skip


def _check(name: str, x: torch.Tensor, tokens: int, like: torch.Tensor) -> None:
    if x.dim() != 3 or x.shape[0] != tokens:
        raise InvalidArgument(
            f"{name} is {list(x.shape)}, expected [{tokens}, heads, head_dim] as the plan's tokens"
        )
    if x.dtype != like.dtype or x.device != like.device:
        raise InvalidArgument(
            f"{name} is {x.dtype} on {x.device}, expected {like.dtype} on {like.device} as q"
        )


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

    Under autocast q, k and v are cast to its type. Gradients of gradients are refused.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check("q", q, plan.total_q, q)
    _check("k", k, plan.total_k, q)
    _check("v", v, plan.total_k, q)
    if plan.device != q.device:
        raise InvalidArgument(
            f"the plan is on {plan.device} and q on {q.device}; use plan.to({str(q.device)!r})"
        )
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(q.shape[2])
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    header, buffer = plan.lists(q, k, v, softcap, needs_grad)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    if torch.compiler.is_compiling():
        out, lse = _ops.forward(
            q, k, v, buffer, header, float(softmax_scale), float(softcap), deterministic
        )
    elif needs_grad:
        out, lse = _ops.Attention.apply(
            q, k, v, buffer, header, softmax_scale, softcap, deterministic
        )
    else:
        out, lse = _engine.forward(q, k, v, buffer, header, softmax_scale, softcap)
    return (out, lse) if return_lse else out
