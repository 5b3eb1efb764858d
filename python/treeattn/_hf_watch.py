"""Sees to it that a tree given to a transformers model reaches every attention layer.

A model may drop keyword arguments on the way to its layers, and a layer that got none would compute
plain causal attention without a word. So calls of models are watched while a tree is among their
arguments: layers that ran are noted by forward hooks, those that took the tree by the attention
function.
"""

from __future__ import annotations

import inspect
import re
import threading
import warnings

import torch

from . import _native
from ._native import InvalidArgument, TreeAttnError, Unsupported

NAME = "tree_attn"
TREE_ARGUMENTS = ("tree_plan", "tree_dfs_order_start_q", "tree_dfs_order_end_k")

# Implementations whose attention would leave the arrays out; others may have been patched for them.
_DEAF = ("sdpa", "eager", "flex_attention")
_LAYER_TYPES = ("layer_types", "layers_block_type", "block_types")
_HARMLESS_TYPES = ("full_attention", "attention", "mlp", "moe", "dense", "sparse")
# Refused layer by layer, with the layer's name.
_WINDOW_TYPES = ("sliding", "chunked")
_MIXERS = re.compile(
    r"Mamba|SSM|Rwkv|RWKV|DeltaNet|DeltaRule|LinearAttention|LightningAttention|RecurrentBlock|"
    r"RgLru|ShortConv|RetNet|xLSTM|Hyena"
)


class _Watch:
    def __init__(self):
        self.took: set[int] = set()
        self.ran: list[torch.nn.Module] = []


class _Running:
    """What compiled code asks, which cannot follow thread-local variables: how many calls with a
    tree are running, in this thread or another."""

    count = 0


_here = threading.local()
_running = _Running()


def tree_given() -> bool:
    """Whether a model that is running was given a tree."""
    if torch.compiler.is_compiling():
        return _running.count > 0
    return getattr(_here, "watch", None) is not None


def layer_name(module) -> str:
    index = getattr(module, "layer_idx", None)
    return type(module).__name__ if index is None else f"layer {index} ({type(module).__name__})"


def took(module) -> None:
    """Called by an attention layer that has the tree."""
    if not torch.compiler.is_compiling():
        watch = getattr(_here, "watch", None)
        if watch is not None:
            watch.took.add(id(module))


def refuse_lost_tree(module) -> None:
    """Called by a causal attention layer that has no tree."""
    if tree_given():
        raise lost_tree(layer_name(module))


def lost_tree(layer: str) -> TreeAttnError:
    return TreeAttnError(
        f"{layer} ran without the tree that was given to the model, so it would have computed "
        "something else; expected each attention layer to take it. Let the model's forward pass "
        f"its keyword arguments on to its layers, and use attn_implementation={NAME!r} throughout"
    )


def _ran(module, args, output) -> None:
    if torch.compiler.is_compiling():
        return
    watch = getattr(_here, "watch", None)
    if watch is not None:
        watch.ran.append(module)


def _implementation(config) -> str | None:
    return getattr(config, "_attn_implementation", None)


def _text_config(model):
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        return config.get_text_config()
    return config


def _refuse_config(model: str, config) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise Unsupported(
            f"{model} is an encoder-decoder and was given a tree; expected a decoder-only model. "
            "Run it without a tree"
        )
    for name in _LAYER_TYPES:
        types = getattr(config, name, None)
        if not isinstance(types, (list, tuple)):
            continue
        for layer, kind in enumerate(types):
            if kind not in _HARMLESS_TYPES and not str(kind).startswith(_WINDOW_TYPES):
                raise Unsupported(
                    f"layer {layer} of {model} is {kind!r} and a tree was given: layers that mix "
                    "tokens without attention carry one branch's state into the next. Expected "
                    "attention layers only; run this model on unshared rows, without a tree"
                )


def _refuse_mixers_and_watch_attention(model) -> bool:
    """Refuses hybrids that their configuration does not tell; whether there is attention."""
    watched = False
    for name, module in model.named_modules():
        causal = getattr(module, "is_causal", None)
        if not hasattr(module, "layer_idx"):
            continue
        depthwise = any(
            isinstance(child, torch.nn.Conv1d) and child.kernel_size[0] > 1
            for child in module.children()
        )
        if depthwise or _MIXERS.search(type(module).__name__):
            raise Unsupported(
                f"{name} ({type(module).__name__}) of {type(model).__name__} mixes tokens without "
                "attention, and a tree was given: it would carry one branch's state into the next. "
                "Expected attention layers only; run this model on unshared rows, without a tree"
            )
        if causal is True:
            watched = True
            if _ran not in module._forward_hooks.values():
                module.register_forward_hook(_ran)
    return watched


def _check_after(watch: _Watch, attention: bool) -> None:
    for module in watch.ran:
        if id(module) not in watch.took:
            raise lost_tree(layer_name(module))
    # Layers in compiled regions leave no trace here: they were checked when they were compiled.
    if not watch.took and (watch.ran or not attention):
        raise lost_tree("every layer")


def _first(kwargs, *names):
    for name in names:
        if kwargs.get(name) is not None:
            return kwargs[name]
    return None


def _depths(cu_q, cu_k, a, b, lowering) -> torch.Tensor:
    """int64 [tokens]: how many keys each query sees before itself, of as many keys as queries."""
    if lowering == _native.LOWER_INTERVALS:
        first, end = a.long(), a.long() + b.long()
    else:
        tokens = torch.arange(a.numel(), device=a.device)
        # Sequences number their nodes each for itself; this makes one ascending list of all.
        shift = torch.searchsorted(cu_q[1:].long(), tokens, right=True) << 32
        first = tokens
        end = torch.searchsorted(a.long() + shift, b.long() + shift, right=True)
        end = torch.maximum(end, first)
    steps = torch.zeros(first.numel() + 1, dtype=torch.long, device=a.device)
    ones = torch.where(end > first, 1, 0)
    steps = steps.index_add(0, first, ones).index_add(0, end, -ones)
    return (steps.cumsum(0)[:-1] - 1).clamp(min=0)


def _position_ids(name: str, args, kwargs) -> torch.Tensor:
    """The depths of a tree, in the shape of the tokens that a model was given."""
    depths = _depths_of_tree(kwargs)
    tokens = _first(kwargs, "input_ids", "inputs_embeds")
    if tokens is None and args:
        tokens = args[0]
    if tokens is None:
        return depths.reshape(1, -1)
    rows, columns = tokens.shape[:2]
    if depths.numel() != rows * columns:
        raise InvalidArgument(
            f"the tree has {depths.numel()} query tokens and {name} got {rows} x {columns}; "
            "expected as many. Virtual tokens of prompt tuning are in no tree: use an adapter "
            "that adds none, such as LoRA"
        )
    return depths.reshape(rows, columns)


def _depths_of_tree(kwargs) -> torch.Tensor:
    plan = kwargs.get("tree_plan")
    if plan is not None:
        known = getattr(plan, "position_ids", None)
        if known is not None:
            return known
        if plan.total_q != plan.total_k or plan._a is None:
            raise InvalidArgument(
                "position_ids are missing; expected the depth of each token, which follows from "
                "the plan only where it is a tree or intervals with as many queries as keys"
            )
        return _depths(plan.cu_seqlens_q, plan.cu_seqlens_k, plan._a, plan._b, plan.lowering)
    start, end = kwargs.get("tree_dfs_order_start_q"), kwargs.get("tree_dfs_order_end_k")
    if start is None or end is None or start.numel() != end.numel():
        raise InvalidArgument(
            "position_ids are missing; expected the depth of each token, which follows from "
            "tree_dfs_order_start_q and tree_dfs_order_end_k only where they are equally long"
        )
    cu = kwargs.get("cu_seq_lens_q")
    if cu is None:
        rows, columns = start.shape if start.dim() == 2 else (1, start.numel())
        cu = torch.arange(rows + 1, device=start.device) * columns
    cu = cu.reshape(-1)
    return _depths(cu, cu, start.reshape(-1), end.reshape(-1), _native.LOWER_TREE)


def _given(model, args, kwargs, name: str) -> bool:
    """Whether a call gives an argument, by name or by place."""
    if kwargs.get(name) is not None:
        return True
    if len(args) <= 1 or torch.compiler.is_compiling():
        return False
    places = list(inspect.signature(type(model).forward).parameters)[1:]
    return name in places[: len(args)] and args[places.index(name)] is not None


def _check_arguments(model, args, kwargs):
    if _given(model, args, kwargs, "attention_mask"):
        raise InvalidArgument(
            f"attention_mask was given to {type(model).__name__} together with a tree; expected "
            "None. Leave it out: padding at the end of a packed batch is tokens past the last "
            "entry of cu_seqlens"
        )
    if kwargs.get("labels") is not None and kwargs.get("shift_labels") is None:
        if not torch.compiler.is_compiling():
            warnings.warn(
                "labels were given together with a tree: transformers shifts them along the packed "
                "order, where the last token of one branch is followed by the first of another. "
                "Set the label of each branch's first token to -100, or compute the loss from the "
                "logits and the targets that treeattn's packing gives",
                stacklevel=4,
            )


def call(model, args, kwargs, module_call):
    """Calls a model with a tree among its keyword arguments."""
    if tree_given():  # a model inside the model that is watched
        return module_call(model, *args, **kwargs)
    name = type(model).__name__
    config = _text_config(model)
    implementation = _implementation(config)
    if implementation != NAME:
        if kwargs.get("tree_plan") is not None or implementation in _DEAF:
            raise InvalidArgument(
                f"{name} was given a tree and its attn_implementation is {implementation!r}, which "
                f"would leave it out; expected {NAME!r}: call treeattn.register() and "
                f"model.set_attn_implementation({NAME!r})"
            )
        return module_call(model, *args, **kwargs)
    _check_arguments(model, args, kwargs)
    _refuse_config(name, config)
    if not _given(model, args, kwargs, "position_ids"):
        kwargs = {**kwargs, "position_ids": _position_ids(name, args, kwargs)}
    if torch.compiler.is_compiling():
        return _running_call(model, args, kwargs, module_call)
    attention = _refuse_mixers_and_watch_attention(model)
    _here.watch = watch = _Watch()
    try:
        output = _running_call(model, args, kwargs, module_call)
    finally:
        _here.watch = None
    _check_after(watch, attention)
    return output


def _running_call(model, args, kwargs, module_call):
    _running.count += 1
    try:
        return module_call(model, *args, **kwargs)
    finally:
        _running.count -= 1


def install() -> None:
    """Lets calls of transformers models that have a tree among their arguments be watched."""
    from transformers import PreTrainedModel

    replaced = PreTrainedModel.__dict__.get("__call__")
    if getattr(replaced, "_treeattn", False):
        return

    def module_call(self, *args, **kwargs):
        if replaced is not None:
            return replaced(self, *args, **kwargs)
        return super(PreTrainedModel, self).__call__(*args, **kwargs)

    def __call__(self, *args, **kwargs):
        for name in TREE_ARGUMENTS:
            if kwargs.get(name) is not None:
                return call(self, args, kwargs, module_call)
        return module_call(self, *args, **kwargs)

    __call__._treeattn = True
    PreTrainedModel.__call__ = __call__
