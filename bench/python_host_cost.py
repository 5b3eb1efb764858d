#!/usr/bin/env python3
"""What one eager call from Python costs the host, in microseconds, as JSON.

    python3 bench/python_host_cost.py [--device cpu] [--calls 200] [--repeats 20]

The problem is tiny, so on a GPU the host is what limits; each repeat's calls are queued without
synchronising, and the fastest repeat counts. The figures under `python_alone` are taken with a C
function in the library's place that does nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import time

import torch
import treeattn
from treeattn import _native

TOKENS, HEADS, HEADS_KV, DIM = 64, 4, 2, 64


def best(run, calls: int, repeats: int, device: torch.device) -> float:
    """Microseconds of one run."""
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - began) / calls)
    return round(min(times) * 1e6, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens = TOKENS if device.type == "cuda" else 1

    ints = dict(dtype=torch.int32, device=device)
    start, end = torch.zeros(tokens, **ints), torch.zeros(tokens, **ints)
    cu = torch.tensor([0, tokens], **ints)
    q = torch.randn(tokens, HEADS, DIM, dtype=dtype, device=device, requires_grad=True)
    k, v = (
        torch.randn(tokens, HEADS_KV, DIM, dtype=dtype, device=device, requires_grad=True)
        for _ in range(2)
    )
    plan = treeattn.plan(cu, tree_dfs_order_start_q=start, tree_dfs_order_end_k=end)

    def native():
        return treeattn.tree_attention(q, k, v, plan)

    def drop_in():
        return treeattn.flash_attn_varlen_func(
            q, k, v, cu, cu, tokens, tokens, causal=True,
            tree_dfs_order_end_k=end, tree_dfs_order_start_q=start,
        )  # fmt: skip

    def without_gradients(run):
        def wrapped():
            with torch.no_grad():
                run()

        return wrapped

    dout = torch.ones(tokens, HEADS, DIM, dtype=dtype, device=device)

    def forward_and_backward():
        torch.autograd.grad(native(), (q, k, v), dout)

    def sdpa():
        torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None], q.transpose(0, 1)[None], q.transpose(0, 1)[None]
        )

    def measure(run):
        run()
        return best(run, options.calls, options.repeats, device)

    runs = {
        "tree_attention": native,
        "tree_attention_no_grad": without_gradients(native),
        "flash_attn_varlen_func": drop_in,
        "flash_attn_varlen_func_no_grad": without_gradients(drop_in),
    }
    figures = {name: measure(run) for name, run in runs.items()}
    figures["forward_and_backward"] = measure(forward_and_backward)
    figures["sdpa_for_comparison"] = measure(sdpa)
    library = _native.load()
    nothing = ctypes.CDLL("libm.so.6").fegetround  # ignores its arguments and returns 0
    nothing.argtypes = library.treeattn_forward.argtypes
    library.treeattn_forward = nothing
    alone = {name: measure(run) for name, run in runs.items()}
    if device.type == "cuda":
        torch.cuda.synchronize()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    print(
        json.dumps(
            {
                "unit": "us of host time per call",
                "device": str(device),
                "device_name": name or platform.machine(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "treeattn": treeattn.__version__,
                "calls": options.calls,
                "repeats": options.repeats,
                "us": figures,
                "python_alone": alone,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
