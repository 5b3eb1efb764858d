"""FlashAttention's varlen function with tree arrays, and the plans that its calls share."""

from __future__ import annotations

import os
import weakref

import torch

from . import _engine, _native, _ops, attention
from ._native import InvalidArgument, Unsupported

_MAX_PLANS = 16
_plans: dict[tuple, _Shared] = {}


class _Shared:
    """A plan, and how to tell that the arrays it was made from are still those of the caller."""

    __slots__ = ("references", "state", "plan", "capture")


def _anchor(x: torch.Tensor) -> torch.Tensor:
    """The tensor whose life tells whether x's memory is still x's: views come and go."""
    return x._base if x._is_view() else x


def _state(arrays) -> tuple:
    return tuple(
        None if x is None else (x.data_ptr(), x._version, x.shape, x.stride(), x.dtype)
        for x in arrays
    )


def shared_plan(total_q, total_k, cu_q, cu_k, a, b, lowering) -> attention.Plan:
    """A plan made from these arrays, or the one that was: of the same live tensors, unchanged
    since by PyTorch's own count of changes. Plans are dropped with their tensors.

    What a graph capture records is made anew in it, because its replays may find other values.
    """
    arrays = (cu_q, cu_k, a, b)
    if any(x is not None and x.is_inference() for x in arrays):
        # Changes of such tensors are not counted.
        return _plan_of(total_q, total_k, arrays, lowering)
    anchors = [_anchor(x) for x in arrays if x is not None]
    state = _state(arrays)
    key = (*[id(x) for x in anchors], *[s and s[0] for s in state], total_q, total_k, lowering)
    capture = _engine.capture_id(cu_q.device)
    found = _plans.get(key)
    if (
        found is not None
        and found.state == state
        and found.capture == capture
        and capture != 0
        and all(held() is x for held, x in zip(found.references, anchors))
    ):
        return found.plan
    made = _Shared()
    made.plan = _plan_of(total_q, total_k, arrays, lowering)
    made.state, made.capture = state, capture

    def forget(_, key=key, made=weakref.ref(made.plan)):
        held = _plans.get(key)
        if held is not None and held.plan is made():
            _plans.pop(key, None)

    made.references = [weakref.ref(x, forget) for x in anchors]
    _plans.pop(key, None)
    _plans[key] = made
    while len(_plans) > _MAX_PLANS:
        _plans.pop(next(iter(_plans), None), None)
    return made.plan


class _Checked:
    """Arrays of an eager call that were checked, and the plan they led to."""

    __slots__ = ("arrays", "plan")

    def __init__(self, arrays, plan):
        # Weak: the plan must not outlive the caller's tensors.
        self.arrays = [
            None if x is None else (weakref.ref(x), x.data_ptr(), x._version, x.shape)
            for x in arrays
        ]
        self.plan = weakref.ref(plan)

    def holds(self, arrays) -> bool:
        for seen, x in zip(self.arrays, arrays):
            if x is None:
                continue  # so it was: the key has no id for it
            held, pointer, version, shape = seen
            if held() is not x or x._version != version or x.data_ptr() != pointer:
                return False
            if x.shape != shape:
                return False
        return True


_checked: dict[tuple, _Checked] = {}


def _checked_plan(q, k, arrays, key) -> attention.Plan | None:
    """The plan of an earlier eager call with these very tensors, which then needs no checks."""
    found = _checked.get(key)
    if found is None or not found.holds(arrays) or _engine.capturing(q):
        return None
    plan = found.plan()
    if plan is None or plan.total_q != q.shape[0] or plan.total_k != k.shape[0]:
        return None
    return plan


def forget_plans() -> None:
    """Drops the plans that calls of flash_attn_varlen_func share. Only needed after a change of
    the arrays that PyTorch does not count: through .data, a NumPy view or a raw pointer."""
    _plans.clear()
    _checked.clear()


def _plan_of(total_q, total_k, arrays, lowering) -> attention.Plan:
    # detach: an alias that neither keeps the caller's object alive nor carries its weak references.
    cu_q, cu_k, a, b = (
        None if x is None else x.detach().to(torch.int32).contiguous() for x in arrays
    )
    plan = attention.Plan(lowering, cu_q, cu_k, a, b, total_q, total_k)
    if os.environ.get("TREEATTN_VALIDATE", "0") not in ("", "0") and (
        _engine.capture_id(cu_q.device) is None
    ):
        plan.validate()
    return plan


def _array(name: str, x, tokens: int | None, device) -> None:
    if not isinstance(x, torch.Tensor) or x.dim() != 1:
        raise InvalidArgument(
            f"{name} is {list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__}, "
            "expected a tensor of one dimension"
        )
    if x.dtype not in (torch.int32, torch.int64):
        raise InvalidArgument(f"{name} is {x.dtype}, expected torch.int32")
    if x.device != device:
        raise InvalidArgument(f"{name} is on {x.device}, expected {device} as q")
    if tokens is not None and x.shape[0] != tokens:
        raise InvalidArgument(f"{name} has {x.shape[0]} elements, expected {tokens}, one a token")


def _one_of(name: str, x, other_name: str, other):
    if x is not None and other is not None:
        raise InvalidArgument(f"{name} and {other_name} are two names of one array; pass one")
    return x if x is not None else other


def refuse(
    dropout_p=0.0, window_size=(-1, -1), alibi_slopes=None, block_table=None, sinks=None,
    causal=True, max_seqlen_k=None,
) -> bool:  # fmt: skip
    """Raises Unsupported for what the kernels do not compute. Returns causal, which a window of
    (-1, 0) means too."""
    left, right = (-1 if side is None else side for side in window_size)
    if isinstance(max_seqlen_k, int):  # windows that reach every key are none, as FlashAttention has it
        left = -1 if left >= max_seqlen_k else left
        right = -1 if right >= max_seqlen_k else right
    if causal:
        right = -1 if left < 0 else right
    elif left < 0 and right == 0:
        causal, right = True, -1
    for name, given, wanted in (
        ("dropout_p", dropout_p, not dropout_p),
        ("window_size", tuple(window_size), left < 0 and right < 0),
        ("alibi_slopes", "given", alibi_slopes is None),
        ("block_table", "given", block_table is None),
        ("attention sinks", "given", sinks is None),
    ):
        if not wanted:
            raise Unsupported(
                f"{name} is {given}, which treeattn does not support yet; it would otherwise be "
                f"left out without a word. Run this model without {name}, or with another "
                "attention implementation"
            )
    return causal


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes=None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table=None,
    tree_dfs_order_end_k: torch.Tensor | None = None,
    tree_dfs_order_start_q: torch.Tensor | None = None,
    *,
    tree_end_position_id_k: torch.Tensor | None = None,
    tree_start_position_id_q: torch.Tensor | None = None,
    s_aux=None,
    learnable_sink=None,
):
    """FlashAttention's function of this name, with the tree arrays of its tree-attention fork.

    Args:
        q: [total_q, heads, head_dim], f16 or bf16; on the CPU f32 and f64 too.
        k: [total_k, heads_kv, head_dim]; heads is a multiple of heads_kv.
        v: [total_k, heads_kv, head_dim_v].
        cu_seqlens_q, cu_seqlens_k: int32 [batch + 1], from 0.
        max_seqlen_q, max_seqlen_k: not needed; only a window is compared with them.
        softmax_scale: default 1 / sqrt(head_dim).
        causal: aligned to the bottom right. True is required with tree arrays.
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
        deterministic: gradients are the same bits in every run.
        return_attn_probs: return (out, lse, None): the third value is FlashAttention's dropout
            pattern, of which there is none.
        tree_dfs_order_end_k: int32 [total_k], highest DFS index in the subtree of each key's node.
        tree_dfs_order_start_q: int32 [total_q], DFS index of each query token's node.
        tree_end_position_id_k, tree_start_position_id_q: other names of these two.
        dropout_p, window_size, alibi_slopes, block_table, s_aux, learnable_sink: refused, unless
            they ask for nothing.

    Returns:
        out [total_q, heads, head_dim_v], or (out, lse, None) with lse [heads, total_q], f32,
        natural logarithm. Both are differentiable.

    Calls with the same arrays, unchanged, share a plan: see :func:`treeattn.plan` to make one
    yourself. With TREEATTN_VALIDATE=1 in the environment each new plan is validated, which
    synchronises; otherwise an invalid tree comes out as NaN.

    Raises:
        Unsupported: dropout, a window, ALiBi, a block table or attention sinks were asked for.
        InvalidArgument: one tree array without the other, tree arrays with causal=False, or shapes
            and types that do not go together.
    """
    end_k = _one_of(
        "tree_dfs_order_end_k", tree_dfs_order_end_k,
        "tree_end_position_id_k", tree_end_position_id_k,
    )  # fmt: skip
    start_q = _one_of(
        "tree_dfs_order_start_q", tree_dfs_order_start_q,
        "tree_start_position_id_q", tree_start_position_id_q,
    )  # fmt: skip
    tree = start_q is not None
    if tree != (end_k is not None):
        missing = "tree_dfs_order_end_k" if tree else "tree_dfs_order_start_q"
        raise InvalidArgument(f"{missing} is missing: tree attention takes both arrays or none")
    if tree and not causal:
        raise InvalidArgument("causal is False with tree arrays, expected True")
    sinks = s_aux if s_aux is not None else learnable_sink
    if (
        dropout_p or window_size != (-1, -1) or alibi_slopes is not None or block_table is not None
        or sinks is not None
    ):  # fmt: skip
        causal = refuse(
            dropout_p, window_size, alibi_slopes, block_table, sinks, causal, max_seqlen_k
        )
    q, k, v = attention.autocast(q, k, v)
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise InvalidArgument(
            f"q, k and v are {list(q.shape)}, {list(k.shape)} and {list(v.shape)}, expected "
            "[tokens, heads, head_dim] of each"
        )
    trace = attention.traced(q, k, v)
    given = (cu_seqlens_q, cu_seqlens_k, start_q, end_k)
    plan = key = None
    if not trace:
        if _engine.transformed():
            given = tuple(None if x is None else _engine.unwrapped(x) for x in given)
        key = (*map(id, given), causal)
        plan = _checked_plan(q, k, given, key)
    if plan is None:
        device = q.device
        _array("cu_seqlens_q", cu_seqlens_q, None, device)
        _array("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape[0], device)
        lowering = _native.LOWER_CAUSAL if causal else _native.LOWER_FULL
        if tree:
            _array("tree_dfs_order_start_q", start_q, q.shape[0], device)
            _array("tree_dfs_order_end_k", end_k, k.shape[0], device)
            lowering = _native.LOWER_TREE
        if trace:
            out, lse = _ops.varlen_forward(
                q, k, v, *given, lowering, attention.scale_of(q, softmax_scale), float(softcap),
                deterministic or torch.are_deterministic_algorithms_enabled(),
            )  # fmt: skip
            return (out, lse, None) if return_attn_probs else out
        with _engine.outside_of_transforms():
            plan = shared_plan(q.shape[0], k.shape[0], *given, lowering)
        if any(held.plan is plan and held.capture is None for held in list(_plans.values())):
            if len(_checked) >= _MAX_PLANS:
                _checked.clear()
            _checked[key] = _Checked(given, plan)
    result = attention.eager(
        q, k, v, plan, softmax_scale, softcap, deterministic, return_attn_probs
    )
    return (*result, None) if return_attn_probs else result
