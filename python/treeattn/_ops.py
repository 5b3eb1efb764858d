"""Attention as autograd sees it: a function for eager mode, operators for everything that traces.

An operator's dispatch costs more than the call itself, so plain eager tensors go around it.
"""

from __future__ import annotations

import torch

from . import _engine
from ._native import Unsupported

Tensor = torch.Tensor


def _empty_gradients(q, k, v):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _empty_outputs(q, v):
    out = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    return out, q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("treeattn::forward", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Tensor, header: list[int], softmax_scale: float,
    softcap: float, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention by a plan's buffer and header."""
    lists = _engine.lists_of(plan, header, q, k, v, softcap, False)
    return _engine.forward(lists, q, k, v, softmax_scale, softcap)


@forward.register_fake
def _(q, k, v, plan, header, softmax_scale, softcap, deterministic):
    return _empty_outputs(q, v)


@torch.library.custom_op("treeattn::backward", mutates_args=())
def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    plan: Tensor, header: list[int], softmax_scale: float, softcap: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    lists = _engine.lists_of(plan, header, q, k, v, softcap, True)
    return _engine.backward(
        lists, dout, dlse, q, k, v, out, lse, softmax_scale, softcap, deterministic
    )


@backward.register_fake
def _(dout, dlse, q, k, v, out, lse, plan, header, softmax_scale, softcap, deterministic):
    return _empty_gradients(q, k, v)


# The operators below take the arrays that a plan is made from, and share the plan between layers
# at run time: a graph needs no buffer whose size depends on lengths.


@torch.library.custom_op("treeattn::varlen_forward", mutates_args=())
def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, a: Tensor | None,
    b: Tensor | None, lowering: int, softmax_scale: float, softcap: float, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention by cu_seqlens and, for a tree, start_q and end_k."""
    lists = _shared_lists(q, k, v, softcap, cu_q, cu_k, a, b, lowering)
    return _engine.forward(lists, q, k, v, softmax_scale, softcap)


@varlen_forward.register_fake
def _(q, k, v, cu_q, cu_k, a, b, lowering, softmax_scale, softcap, deterministic):
    return _empty_outputs(q, v)


@torch.library.custom_op("treeattn::varlen_backward", mutates_args=())
def varlen_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor, cu_k: Tensor, a: Tensor | None, b: Tensor | None, lowering: int,
    softmax_scale: float, softcap: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    lists = _shared_lists(q, k, v, softcap, cu_q, cu_k, a, b, lowering)
    return _engine.backward(
        lists, dout, dlse, q, k, v, out, lse, softmax_scale, softcap, deterministic
    )


@varlen_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, cu_q, cu_k, a, b, lowering, scale, softcap, deterministic):
    return _empty_gradients(q, k, v)


def _shared_lists(q, k, v, softcap, cu_q, cu_k, a, b, lowering):
    from . import varlen

    plan = varlen.shared_plan(q.shape[0], k.shape[0], cu_q, cu_k, a, b, lowering)
    return plan.lists(q, k, v, softcap, True)


def _setup_forward(ctx, inputs, output):
    q, k, v, plan, *numbers = inputs
    ctx.save_for_backward(q, k, v, *output, plan)
    ctx.numbers = numbers
    ctx.set_materialize_grads(False)


def _setup_varlen_forward(ctx, inputs, output):
    q, k, v, cu_q, cu_k, a, b, *numbers = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, a, b)
    ctx.numbers = numbers
    ctx.set_materialize_grads(False)


def _gradients_by(operator, arguments):
    def gradients(ctx, dout, dlse):
        if dout is None and dlse is None:
            return (None,) * arguments
        q, k, v, out, lse, *rest = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        grads = operator(dout, dlse, q, k, v, out, lse, *rest, *ctx.numbers)
        return *grads, *[None] * (arguments - 3)

    return gradients


forward.register_autograd(_gradients_by(backward, 8), setup_context=_setup_forward)
varlen_forward.register_autograd(
    _gradients_by(varlen_backward, 11), setup_context=_setup_varlen_forward
)


class Attention(torch.autograd.Function):
    """What the operators do, for eager mode. Takes q, k, v and (lists, softmax_scale, softcap,
    deterministic, lse wanted)."""

    @staticmethod
    def forward(ctx, q, k, v, call):
        lists, softmax_scale, softcap, _, lse_wanted = call
        out, lse = _engine.forward(lists, q, k, v, softmax_scale, softcap)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return (out, lse) if lse_wanted else out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse=None):
        if dout is None and dlse is None:
            return None, None, None, None
        q, k, v, out, lse = ctx.saved_tensors
        lists, softmax_scale, softcap, deterministic, _ = ctx.call
        if dout is None:
            dout = torch.zeros_like(out)
        dq, dk, dv = _engine.backward(
            lists, dout, dlse, q, k, v, out, lse, softmax_scale, softcap, deterministic
        )
        return dq, dk, dv, None


# Function.apply asks once more whether functorch is active, and unwraps its dead tensors.
apply_attention = super(torch.autograd.Function, Attention).apply


class TransformedAttention(torch.autograd.Function):
    """The same in the form that torch.func's transforms ask for; always gives out and lse."""

    @staticmethod
    def forward(q, k, v, call):
        lists, softmax_scale, softcap, *_ = call
        return _engine.forward(lists, q, k, v, softmax_scale, softcap)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.call = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, dlse):
        if dout is None and dlse is None:
            return None, None, None, None
        return *_TransformedGradients.apply(dout, dlse, *ctx.saved_tensors, ctx.call), None


class _TransformedGradients(torch.autograd.Function):
    # Of its own: what a transform hands to backward are values without memory.

    @staticmethod
    def forward(dout, dlse, q, k, v, out, lse, call):
        lists, softmax_scale, softcap, deterministic, _ = call
        dout = torch.zeros_like(out) if dout is None else dout
        return _engine.backward(
            lists, dout, dlse, q, k, v, out, lse, softmax_scale, softcap, deterministic
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise Unsupported(
            "gradients of the gradients of tree attention were asked for, which treeattn does not "
            "compute; differentiate once"
        )
