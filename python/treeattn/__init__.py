"""Exact tree attention: a shared prompt is computed once.

torch and transformers are imported when something that needs them is used. Without torch, plan and
tree_attention take NumPy arrays, forward on the CPU.
"""

from __future__ import annotations

import importlib
import importlib.util

from ._native import InvalidArgument, TreeAttnError, Unsupported

__version__ = "0.1.0"

_PLACES = {
    "Packed": "packing",
    "Plan": "attention",
    "pack": "packing",
    "plan": "attention",
    "register": "hf",
    "tree_attention": "attention",
    "flash_attn_varlen_func": "varlen",
    "forget_plans": "varlen",
}

__all__ = ["InvalidArgument", "TreeAttnError", "Unsupported", *_PLACES]


def __getattr__(name: str):
    place = _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module 'treeattn' has no attribute {name!r}")
    if place == "attention" and importlib.util.find_spec("torch") is None:
        place = "_numpy"
    return getattr(importlib.import_module(f".{place}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
