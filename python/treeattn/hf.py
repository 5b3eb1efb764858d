"""Tree attention as an attention implementation of transformers."""

from __future__ import annotations

import functools

import torch

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
except ImportError as error:
    raise ImportError(
        "treeattn.register() needs transformers 4.53 or newer, with AttentionInterface and "
        f"AttentionMaskInterface: {error}. Update with pip install -U transformers"
    ) from error

from . import _hf_masks, _hf_watch, _native, attention, varlen
from ._hf_watch import NAME, layer_name
from ._native import InvalidArgument, Unsupported


def register() -> None:
    """Makes ``attn_implementation="tree_attn"`` available to transformers models. May be repeated.

    A model then takes a tree as keyword arguments of its call:

    - ``tree_plan``: a plan of :func:`treeattn.plan`, made once per batch, or
    - ``tree_dfs_order_start_q`` and ``tree_dfs_order_end_k``: int32 [tokens] or [batch, tokens],
      with ``cu_seq_lens_q`` and ``cu_seq_lens_k`` (int32 [trees + 1]) where one row holds several
      trees.

    Hidden states are [batch, tokens, ...] with batch * tokens as many as the plan has. Position ids
    are depths: how many tokens of its own row are above a token; they are worked out if left out.
    Without a tree the model computes causal attention: padding (attention_mask [batch, keys]),
    padding-free batches (cu_seq_lens_q and cu_seq_lens_k, or restarting position_ids) and caches as
    elsewhere in transformers.

    Raises, when the model is called:
        InvalidArgument: a tree that does not fit the tokens, or together with an attention_mask.
        Unsupported: a layer or a model that tree attention does not cover, by name.
        TreeAttnError: a tree was given and a layer ran without it.
    """
    AttentionInterface.register(NAME, tree_attn)
    AttentionMaskInterface.register(NAME, _hf_masks.make_mask)
    _hf_watch.install()


def _refuse(module, what: str, instead: str) -> Unsupported:
    return Unsupported(
        f"{layer_name(module)} has {what}, which attn_implementation={NAME!r} does not support; "
        f"{instead}"
    )


def _refuse_features(module, dropout, sliding_window, others) -> None:
    if sliding_window is not None:
        raise _refuse(
            module, f"a sliding window of {sliding_window} tokens",
            "expected full attention. Windows over trees have to be measured in depth",
        )  # fmt: skip
    if dropout:
        raise _refuse(
            module, f"attention dropout of {dropout}", "expected 0: set config.attention_dropout"
        )
    for name, what in (
        ("s_aux", "attention sinks (s_aux)"),
        ("position_bias", "a position bias"),
        ("head_mask", "a head mask"),
    ):
        if others.get(name) is not None:
            raise _refuse(module, what, "use another attention implementation for this model")
    if others.get("output_attentions"):
        raise _refuse(
            module, "output_attentions=True", "probabilities are never stored: use 'eager'"
        )


@functools.lru_cache(32)
def _kept_steps(count: int, step: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.arange(count + 1, dtype=torch.int32, device=device) * step


def _steps(count: int, step: int, device: torch.device) -> torch.Tensor:
    """cu_seqlens of equally long sequences."""
    if torch.compiler.is_compiling():
        return torch.arange(count + 1, dtype=torch.int32, device=device) * step
    return _kept_steps(count, step, device)


def _shared(total_q, total_k, cu_q, cu_k, a, b, lowering) -> attention.Plan:
    """A plan of arrays that all layers of a call have in common."""
    if torch.compiler.is_compiling():
        to_int32 = [None if x is None else x.to(torch.int32) for x in (cu_q, cu_k, a, b)]
        return attention.Plan(lowering, *to_int32, total_q, total_k)
    return varlen.shared_plan(total_q, total_k, cu_q, cu_k, a, b, lowering)


def _cu_seqlens(others, batch, rows, keys, device):
    """The caller's boundaries, or None if he gave none."""
    cu_q, cu_k = others.get("cu_seq_lens_q"), others.get("cu_seq_lens_k")
    if cu_q is None and cu_k is None:
        return None
    if cu_q is None or (cu_k is None and rows != keys):
        missing = "cu_seq_lens_q" if cu_q is None else "cu_seq_lens_k"
        raise InvalidArgument(f"{missing} is missing; expected cu_seq_lens_q and cu_seq_lens_k")
    if batch != 1:
        raise Unsupported(
            f"cu_seq_lens_q was given with a batch of {batch}; expected one row that holds all "
            "sequences, input_ids [1, tokens]"
        )
    cu_q = cu_q.reshape(-1)
    return cu_q, cu_q if cu_k is None else cu_k.reshape(-1)


def _check_sizes(module, plan, batch, rows, keys) -> None:
    if plan.total_q == batch * rows and plan.total_k == batch * keys:
        return
    if rows != keys and plan.total_q == plan.total_k:
        raise Unsupported(
            f"{layer_name(module)} has {keys} keys and {rows} queries: a tree was given and the KV "
            "cache is not empty, or is larger than the batch. Expected an empty cache: pass "
            "use_cache=False (virtual tokens of prefix tuning are cached tokens, too), or a plan "
            "whose keys are the cached tokens and the new ones"
        )
    raise InvalidArgument(
        f"the tree has {plan.total_q} query and {plan.total_k} key tokens, and "
        f"{layer_name(module)} got {batch} x {rows} and {batch} x {keys}; expected as many"
    )


def _tree_tokens(tree_plan, start_q, end_k) -> int | None:
    """Query tokens of a tree; what else passes through a model, such as images, has others."""
    if isinstance(tree_plan, attention.Plan):
        return tree_plan.total_q
    return None if start_q is None else start_q.numel()


def _given_tree(module, query, key, tree_plan, start_q, end_k, others) -> attention.Plan | None:
    if tree_plan is None and start_q is None and end_k is None:
        return None
    batch, rows, keys = query.shape[0], query.shape[2], key.shape[2]
    if tree_plan is not None:
        if start_q is not None or end_k is not None:
            raise InvalidArgument(
                "tree_plan and tree_dfs_order_start_q or tree_dfs_order_end_k were given; expected "
                "a plan or both arrays"
            )
        if not isinstance(tree_plan, attention.Plan):
            raise InvalidArgument(
                f"tree_plan is a {type(tree_plan).__name__}, expected what treeattn.plan returns"
            )
        _check_sizes(module, tree_plan, batch, rows, keys)
        if torch.compiler.is_compiling():
            # The arrays only: a graph must not depend on what the plan was already used for.
            arrays = tree_plan.cu_seqlens_q, tree_plan.cu_seqlens_k, tree_plan._a, tree_plan._b
            return attention.Plan(
                tree_plan.lowering, *arrays, tree_plan.total_q, tree_plan.total_k
            )
        return tree_plan if tree_plan.device == query.device else tree_plan.to(query.device)
    if start_q is None or end_k is None:
        missing = "tree_dfs_order_start_q" if start_q is None else "tree_dfs_order_end_k"
        raise InvalidArgument(
            f"{missing} is missing; expected tree_dfs_order_start_q and tree_dfs_order_end_k"
        )
    cu = _cu_seqlens(others, batch, rows, keys, query.device)
    if cu is None:
        cu = _steps(batch, rows, query.device), _steps(batch, keys, query.device)
    start_q, end_k = start_q.reshape(-1), end_k.reshape(-1)
    if start_q.shape[0] != batch * rows or end_k.shape[0] != batch * keys:
        if rows != keys and start_q.shape[0] == end_k.shape[0]:
            _check_sizes(module, _Sizes(start_q.shape[0], end_k.shape[0]), batch, rows, keys)
        raise InvalidArgument(
            f"tree_dfs_order_start_q has {start_q.shape[0]} elements and tree_dfs_order_end_k "
            f"{end_k.shape[0]}; {layer_name(module)} got {batch} x {rows} queries and {batch} x "
            f"{keys} keys, expected one element each"
        )
    arrays = [x if x.device == query.device else x.to(query.device) for x in (*cu, start_q, end_k)]
    return _shared(batch * rows, batch * keys, *arrays, _native.LOWER_TREE)


class _Sizes:
    def __init__(self, total_q, total_k):
        self.total_q, self.total_k = total_q, total_k


def _plan_of_mask(mask, batch, rows, keys, position_ids) -> attention.Plan:
    restarts = position_ids if _may_restart(mask, rows, keys, position_ids) else None
    if not torch.compiler.is_compiling():
        # Nobody changes the mask of a call, so it may carry the plan from layer to layer.
        kept = getattr(mask, "_treeattn_plan", None)
        if kept is not None and kept[0] is restarts:
            return kept[1]
    intervals = mask if restarts is None else _hf_masks.cut(mask, restarts)
    cu_q, cu_k = (_steps(batch, count, mask.device) for count in (rows, keys))
    first, length = _hf_masks.intervals(intervals)
    plan = attention.Plan(
        _native.LOWER_INTERVALS, cu_q, cu_k, first, length, batch * rows, batch * keys
    )
    if not torch.compiler.is_compiling():
        mask._treeattn_plan = restarts, plan
    return plan


def _may_restart(mask, rows, keys, position_ids) -> bool:
    return (
        isinstance(position_ids, torch.Tensor)
        and position_ids.dim() == 2
        and rows == keys == position_ids.shape[1]
        and mask.shape[2] == _hf_masks.PADDED
    )


def _causal_plan(module, query, key, mask, kind, position_ids, others) -> attention.Plan:
    """The plan of a call without a tree."""
    batch, rows, keys = query.shape[0], query.shape[2], key.shape[2]
    cu = _cu_seqlens(others, batch, rows, keys, query.device)
    if cu is not None:
        if kind == _hf_masks.PADDED:
            raise InvalidArgument(
                "attention_mask and cu_seq_lens_q were given; expected one of them"
            )
        return _shared(rows, keys, *cu, None, None, _native.LOWER_CAUSAL)
    if mask is None:
        packed = isinstance(position_ids, torch.Tensor) and position_ids.dim() == 2
        if not packed or rows != keys or position_ids.shape[1] != rows:
            sizes = _steps(batch, rows, query.device), _steps(batch, keys, query.device)
            return _shared(batch * rows, batch * keys, *sizes, None, None, _native.LOWER_CAUSAL)
        ends = _hf_masks.tokens_before(
            _hf_masks.restarts(position_ids.expand(batch, -1), None)
        )
        mask = _hf_masks.causal(batch, rows, keys, 0, query.device, None, ends)
    elif kind is None and mask.dim() == 2:
        real = mask[:, -keys:].bool()
        mask = _hf_masks.causal(batch, rows, keys, keys - rows, query.device, real)
    elif kind not in (_hf_masks.CAUSAL, _hf_masks.PADDED):
        what = (
            "a mask other than causal (a window, chunks or an overlay)"
            if kind == _hf_masks.OTHER
            else f"a mask of its own, {mask.dtype} {list(mask.shape)}"
        )
        raise _refuse(
            module, what, "expected attention_mask [batch, keys] or none. Use another attention "
            "implementation, or give the tree as tree_plan",
        )  # fmt: skip
    if mask.shape[0] != batch or mask.shape[3] != keys:
        raise InvalidArgument(
            f"{layer_name(module)} got {batch} sequences of {keys} keys and a mask for "
            f"{mask.shape[0]} of {mask.shape[3]}; expected as many"
        )
    return _plan_of_mask(mask, batch, rows, keys, position_ids)


def _full_attention(module, query, key, value, mask, kind, dropout, scaling, others):
    """Modules that are not causal, such as vision towers, go to PyTorch's own attention."""
    if kind == _hf_masks.FULL:
        mask = mask.bool() if mask.shape[3] else None
    return sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=False, **others
    )


def tree_attn(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    tree_plan: attention.Plan | None = None,
    tree_dfs_order_start_q: torch.Tensor | None = None,
    tree_dfs_order_end_k: torch.Tensor | None = None,
    **others,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function for "tree_attn". See :func:`register`.

    Args:
        query: [batch, heads, queries, head_dim]; key and value: [batch, heads_kv, keys, ...].

    Returns:
        [batch, queries, heads, head_dim_v], and None in place of the probabilities.
    """
    kind = _hf_masks.kind_of(attention_mask)
    tree = tree_plan, tree_dfs_order_start_q, tree_dfs_order_end_k
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if kind == _hf_masks.FULL or (kind is None and not is_causal):
        if query.shape[0] * query.shape[2] == _tree_tokens(*tree):
            raise _refuse(
                module, "full attention and a tree", "expected causal attention or no tree"
            )
        if softcap is not None:
            others["softcap"] = softcap
        return _full_attention(
            module, query, key, value, attention_mask, kind, dropout, scaling, others
        )
    _refuse_features(module, dropout, sliding_window, others)
    plan = _given_tree(module, query, key, *tree, others)
    if plan is None:
        if kind == _hf_masks.TREE:
            raise _hf_watch.lost_tree(layer_name(module))
        _hf_watch.refuse_lost_tree(module)
        plan = _causal_plan(
            module, query, key, attention_mask, kind, others.get("position_ids"), others
        )
    else:
        if kind not in (None, _hf_masks.TREE, _hf_masks.CAUSAL) or (
            kind is None and attention_mask is not None
        ):
            raise InvalidArgument(
                f"{layer_name(module)} got a tree and a mask besides; expected attention_mask=None "
                "and no windows or overlays of the model's own"
            )
        _hf_watch.took(module)
    batch, heads, rows, _ = query.shape
    q, k, v = (
        x[0].transpose(0, 1) if batch == 1 else x.transpose(1, 2).reshape(-1, *x.shape[1::2])
        for x in (query, key, value)
    )
    out = attention.tree_attention(q, k, v, plan, scaling, softcap or 0.0)
    return out.reshape(batch, rows, heads, -1), None
