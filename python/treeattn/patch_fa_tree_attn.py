"""Lets transformers' FlashAttention layers take tree arrays, as FlashAttention's tree fork did.

    from treeattn.patch_fa_tree_attn import patch_FA_tree_attn
    patch_FA_tree_attn()

For new code ``treeattn.register()`` is the better way: it is no patch.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import sys
import threading

import torch

from . import _native, varlen
from ._native import InvalidArgument, TreeAttnError, Unsupported

_TREE = ("tree_dfs_order_end_k", "tree_dfs_order_start_q")
_ALIASES = ("tree_end_position_id_k", "tree_start_position_id_q")
_EXPECTED = (
    "query_states", "key_states", "value_states", "attention_mask", "query_length", "is_causal",
    "dropout", "position_ids", "softmax_scale", "sliding_window", "use_top_left_mask", "softcap",
    "deterministic", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "target_dtype",
)  # fmt: skip
_NAME = "_flash_attention_forward"

_here = threading.local()


def patch_FA_tree_attn() -> None:
    """Patches transformers, 4.57 to 5.x, in this process. May be repeated, at any time.

    Models with ``attn_implementation="flash_attention_2"`` (or one that resembles it) then take
    ``tree_dfs_order_end_k`` and ``tree_dfs_order_start_q`` as keyword arguments of their call: int32
    [tokens] or [batch, tokens], with ``cu_seq_lens_q`` and ``cu_seq_lens_k`` (int32 [trees + 1])
    where a row holds several trees. position_ids should be depths: how many tokens of its own row
    are above a token. Calls without arrays go where they went; where flash_attn is not installed,
    treeattn computes them too, and ``attn_implementation="flash_attention_2"`` needs no flash_attn.

    Raises:
        Unsupported: this version of transformers cannot be patched; or, when a model is called,
            something that the kernels do not compute (a window shorter than the keys, dropout,
            attention sinks, paged caches).
        InvalidArgument: when a model is called with arrays that do not fit, or with padding.
        TreeAttnError: a model was given the arrays and an attention layer did not get them.
    """
    try:
        import transformers
        from transformers import PreTrainedModel, modeling_flash_attention_utils
        from transformers.integrations import flash_attention
        from transformers.utils import is_flash_attn_2_available
    except ImportError as error:
        raise ImportError(
            f"patch_FA_tree_attn needs transformers 4.57 or newer with PyTorch: {error}"
        ) from error

    original = getattr(modeling_flash_attention_utils, _NAME, None)
    if getattr(original, "_treeattn", False):
        return
    adjust = getattr(PreTrainedModel, "_check_and_adjust_attn_implementation", None)
    parameters = inspect.signature(original).parameters if original is not None else {}
    missing = [
        f"parameter {name} where it was" for name, found in
        itertools.zip_longest(_EXPECTED, itertools.islice(parameters, len(_EXPECTED)))
        if name != found
    ]  # fmt: skip
    if "kwargs" not in parameters:
        missing.append("**kwargs")
    if adjust is None:
        missing.append("PreTrainedModel._check_and_adjust_attn_implementation")
    if getattr(flash_attention, _NAME, None) is not original:
        missing.append(f"transformers.integrations.flash_attention.{_NAME}")
    if missing:
        raise Unsupported(
            f"transformers {transformers.__version__} cannot be patched: {_NAME} or its "
            f"surroundings are without {', '.join(missing)}. Expected 4.57 to 5.x; use "
            "treeattn.register() and attn_implementation='tree_attn', which is no patch"
        )
    installed = is_flash_attn_2_available()
    replacement = _replacement(original, installed)
    # Modules that took the function by name before.
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("transformers", "transformers_modules"):
            if vars(module).get(_NAME) is original:
                setattr(module, _NAME, replacement)
    if not installed:
        PreTrainedModel._check_and_adjust_attn_implementation = _adjusted(adjust)
    PreTrainedModel.__call__ = _calling(PreTrainedModel)


def _adjusted(original):
    """Lets models ask for flash_attention_2 where treeattn is all there is of it."""

    @functools.wraps(original)
    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        supported = getattr(self, "_supports_flash_attn", False) or getattr(
            self, "_supports_flash_attn_2", False
        )
        if attn_implementation == "flash_attention_2" and supported:
            return attn_implementation
        return original(self, attn_implementation, *args, **kwargs)

    return _check_and_adjust_attn_implementation


def _calling(model_class):
    """Notes that a model was given arrays, so that a layer without them can say so."""
    replaced = model_class.__dict__.get("__call__")

    def call(self, *args, **kwargs):
        if replaced is not None:
            return replaced(self, *args, **kwargs)
        return super(model_class, self).__call__(*args, **kwargs)

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling() or all(kwargs.get(name) is None for name in _TREE):
            return call(self, *args, **kwargs)
        implementation = getattr(getattr(self, "config", None), "_attn_implementation", None)
        if implementation in ("eager", "sdpa", "flex_attention"):
            raise InvalidArgument(
                f"{type(self).__name__} was given tree arrays and its attn_implementation is "
                f"{implementation!r}, which would leave them out; expected 'flash_attention_2'"
            )
        outer, _here.model = getattr(_here, "model", None), type(self).__name__
        try:
            return call(self, *args, **kwargs)
        finally:
            _here.model = outer

    # Others that wrap the method, such as treeattn.register(), look for their mark in it.
    __call__.__dict__.update(getattr(replaced, "__dict__", {}))
    return __call__


def _replacement(original, installed: bool):
    @functools.wraps(original)
    def _flash_attention_forward(
        query_states, key_states, value_states, attention_mask, query_length, is_causal,
        dropout=0.0, position_ids=None, softmax_scale=None, sliding_window=None,
        use_top_left_mask=False, softcap=None, deterministic=None, cu_seq_lens_q=None,
        cu_seq_lens_k=None, max_length_q=None, max_length_k=None, target_dtype=None, **kwargs,
    ):  # fmt: skip
        arrays = [kwargs.pop(name, None) for name in (*_TREE, *_ALIASES)]
        given = any(x is not None for x in arrays)
        if not given:
            _refuse_lost_arrays(is_causal)
        if not given and installed:
            return original(
                query_states, key_states, value_states, attention_mask, query_length, is_causal,
                dropout, position_ids, softmax_scale, sliding_window, use_top_left_mask, softcap,
                deterministic, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k,
                target_dtype, **kwargs,
            )  # fmt: skip
        call = dict(
            kwargs, query_states=query_states, key_states=key_states, value_states=value_states,
            attention_mask=attention_mask, is_causal=is_causal, dropout=dropout,
            position_ids=position_ids, softmax_scale=softmax_scale, sliding_window=sliding_window,
            softcap=softcap, deterministic=deterministic, cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k, max_length_q=max_length_q, max_length_k=max_length_k,
            target_dtype=target_dtype,
        )  # fmt: skip
        _refuse(call)
        return _tree(call, *arrays) if given else _plain(call)

    _flash_attention_forward._treeattn = True
    return _flash_attention_forward


def _refuse_lost_arrays(is_causal: bool) -> None:
    model = None if torch.compiler.is_compiling() else getattr(_here, "model", None)
    if model is not None and is_causal:
        raise TreeAttnError(
            f"an attention layer ran without the tree arrays that were given to {model}, so it "
            "would have computed something else. Let the model's forward pass its keyword "
            "arguments on to its layers"
        )


def _refuse(call) -> None:
    """Raises for what the kernels do not compute."""
    window = call["sliding_window"]
    keys = call["key_states"].shape[1]
    varlen.refuse(
        dropout_p=call["dropout"],
        # As transformers has it: a window that reaches every key is none.
        window_size=(-1, -1) if window is None or keys <= window else (window - 1, 0),
        block_table=call.get("block_table"),
        sinks=call.get("s_aux"),
    )


def _rows(call):
    """q, k and v as [tokens, heads, head_dim], in the type that transformers asks for."""
    states = (call["query_states"], call["key_states"], call["value_states"])
    dtype = call["target_dtype"]
    if dtype is not None and states[0].dtype == torch.float32:
        states = [x.to(dtype) for x in states]
    return [x.reshape(-1, *x.shape[2:]) for x in states]


def _boundaries(call):
    cu_q, cu_k = call["cu_seq_lens_q"], call["cu_seq_lens_k"]
    if (cu_q is None) != (cu_k is None):
        missing = "cu_seq_lens_q" if cu_q is None else "cu_seq_lens_k"
        raise InvalidArgument(f"{missing} is missing, expected cu_seq_lens_q and cu_seq_lens_k")
    if cu_q is not None:
        return cu_q.reshape(-1), cu_k.reshape(-1)
    from .hf import _steps

    query, key = call["query_states"], call["key_states"]
    return tuple(_steps(x.shape[0], x.shape[1], x.device) for x in (query, key))


def _deterministic(call) -> bool:
    if call["deterministic"] is not None:
        return call["deterministic"]
    return os.environ.get("FLASH_ATTENTION_DETERMINISTIC", "0") == "1"


def _tree(call, end_k, start_q, end_k_alias, start_q_alias):
    if call["attention_mask"] is not None:
        raise InvalidArgument(
            "padding (an attention_mask) and tree arrays were given, expected one packed row "
            "without padding: leave attention_mask out"
        )
    q, k, v = _rows(call)
    cu_q, cu_k = _boundaries(call)
    arrays = [
        None if x is None else x.reshape(-1) for x in (end_k, start_q, end_k_alias, start_q_alias)
    ]
    out = varlen.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, call["max_length_q"], call["max_length_k"],
        softmax_scale=call["softmax_scale"], causal=call["is_causal"],
        softcap=call["softcap"] or 0.0, deterministic=_deterministic(call),
        tree_dfs_order_end_k=arrays[0], tree_dfs_order_start_q=arrays[1],
        tree_end_position_id_k=arrays[2], tree_start_position_id_q=arrays[3],
    )  # fmt: skip
    return out.view(call["query_states"].shape[0], -1, *out.shape[1:])


class _Layer:
    """What hf asks of a module here: its name in messages."""

    is_causal = True

    def __init__(self, index):
        self.layer_idx = index


def _plain(call):
    """Attention without a tree, where there is no flash_attn to ask."""
    from . import attention, hf

    if call["is_causal"]:
        q, k, v = (x.reshape(y.shape).transpose(1, 2) for x, y in zip(_rows(call), _states(call)))
        out, _ = hf.tree_attn(
            _Layer(call.get("layer_idx")), q, k, v, call["attention_mask"],
            scaling=call["softmax_scale"], is_causal=True, softcap=call["softcap"],
            position_ids=call["position_ids"], cu_seq_lens_q=call["cu_seq_lens_q"],
            cu_seq_lens_k=call["cu_seq_lens_k"],
        )  # fmt: skip
        return out
    q, k, v = _rows(call)
    cu_q, cu_k = _boundaries(call)
    mask = call["attention_mask"]
    if mask is None:
        lowering, first, length = _native.LOWER_FULL, None, None
    else:
        # Every query of a sequence sees its keys that are no padding.
        batch, rows = call["query_states"].shape[:2]
        seen = mask[:, -call["key_states"].shape[1] :].to(torch.int32)
        starts = torch.arange(batch, dtype=torch.int32, device=mask.device)[:, None] * rows
        lowering = _native.LOWER_INTERVALS
        first, length = starts.expand_as(seen).reshape(-1), (seen * rows).reshape(-1)
    plan = hf._shared(q.shape[0], k.shape[0], cu_q, cu_k, first, length, lowering)
    out = attention.tree_attention(
        q, k, v, plan, call["softmax_scale"], call["softcap"] or 0.0, _deterministic(call)
    )
    return out.view(call["query_states"].shape[0], -1, *out.shape[1:])


def _states(call):
    return call["query_states"], call["key_states"], call["value_states"]
