"""Operators that torch.compile sees, on tensors and integers only, with fakes and gradients.

Outside of a compiled region autograd functions call the library directly: an operator's dispatch
costs more than the call itself.
"""

from __future__ import annotations

import torch

from . import _engine, _native

Tensor = torch.Tensor


@torch.library.custom_op("treeattn::build_plan", mutates_args=())
def build_plan(
    cu_q: Tensor, cu_k: Tensor, a: Tensor | None, b: Tensor | None, lowering: int,
    header: list[int],
) -> Tensor:  # fmt: skip
    return _engine.build_plan(header, lowering, cu_q, cu_k, a, b)


@build_plan.register_fake
def _(cu_q, cu_k, a, b, lowering, header):
    ints = (_native.plan_bytes(_native.PlanHeader.from_ints(header)) + 3) // 4
    return cu_q.new_empty((ints,), dtype=torch.int32)


@torch.library.custom_op("treeattn::forward", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Tensor, header: list[int], softmax_scale: float,
    softcap: float, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _engine.forward(q, k, v, plan, header, softmax_scale, softcap)


@forward.register_fake
def _(q, k, v, plan, header, softmax_scale, softcap, deterministic):
    out = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    return out, q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("treeattn::backward", mutates_args=())
def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    plan: Tensor, header: list[int], softmax_scale: float, softcap: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _engine.backward(
        dout, dlse, q, k, v, out, lse, plan, header, softmax_scale, softcap, deterministic
    )


@backward.register_fake
def _(dout, dlse, q, k, v, out, lse, plan, header, softmax_scale, softcap, deterministic):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _setup(ctx, inputs, output):
    q, k, v, plan, header, softmax_scale, softcap, deterministic = inputs
    ctx.save_for_backward(q, k, v, *output, plan)
    ctx.numbers = header, softmax_scale, softcap, deterministic
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout, dlse):
    q, k, v, out, lse, plan = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 8
    if dout is None:
        dout = torch.zeros_like(out)
    grads = backward(dout, dlse, q, k, v, out, lse, plan, *ctx.numbers)
    return *grads, None, None, None, None, None


forward.register_autograd(_gradients, setup_context=_setup)


class Attention(torch.autograd.Function):
    """What the operator does, for eager mode."""

    @staticmethod
    def forward(ctx, q, k, v, plan, header, softmax_scale, softcap, deterministic):
        out, lse = _engine.forward(q, k, v, plan, header, softmax_scale, softcap)
        ctx.save_for_backward(q, k, v, out, lse, plan)
        ctx.numbers = header, softmax_scale, softcap, deterministic
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse):
        if dout is None and dlse is None:
            return (None,) * 8
        q, k, v, out, lse, plan = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        grads = _engine.backward(dout, dlse, q, k, v, out, lse, plan, *ctx.numbers)
        return *grads, None, None, None, None, None
