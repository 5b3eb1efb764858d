"""What transformers' mask functions become: a few integers per key in place of a mask.

transformers asks for a mask once per forward and hands it to every layer untouched, so the mask is
also how a layer learns what it must not guess. Ours are int32 [batch, 1, rows, keys]; the number of
rows tells which kind it is. They have four dimensions because transformers takes such masks for
finished ones wherever it meets them again.
"""

from __future__ import annotations

import torch
from transformers import masking_utils

from . import _hf_watch
from ._native import Unsupported

FULL = 1  # every query sees the keys that are not 0; without keys, all of them
CAUSAL = 2  # first and length of each key's interval of packed query rows
PADDED = 3  # the same, and whether the key is a token: the caller gave an attention_mask
TREE = 4  # no keys: a tree was given to the model, each layer must have it
OTHER = 5  # no keys: a mask that is no interval per key


def kind_of(mask) -> int | None:
    """Which of ours a mask is; None for masks that are somebody else's."""
    if mask is None or not isinstance(mask, torch.Tensor):
        return None
    if mask.dim() != 4 or mask.dtype != torch.int32 or mask.shape[1] != 1:
        return None
    return mask.shape[2] if FULL <= mask.shape[2] <= OTHER else None


def _bare(kind: int, batch: int, device) -> torch.Tensor:
    return torch.empty((batch, 1, kind, 0), dtype=torch.int32, device=device)


def tokens_before(starts: torch.Tensor) -> torch.Tensor:
    """int64 [batch, tokens], for each token one past the last of its sequence; starts is bool
    [batch, tokens], true where a sequence starts."""
    tokens = starts.shape[1]
    at = torch.arange(tokens, device=starts.device)
    next_start = torch.where(starts, at, tokens).flip(1).cummin(1).values.flip(1)
    return torch.nn.functional.pad(next_start[:, 1:], (0, 1), value=tokens)


def restarts(position_ids: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """bool [batch, tokens]: where position ids fall back or are 0, among the real tokens."""
    tokens = position_ids.shape[1]
    if real is None:
        before = torch.nn.functional.pad(position_ids[:, :-1], (1, 0), value=-1)
        return (position_ids < before) | (position_ids == 0)
    at = torch.arange(tokens, device=position_ids.device)
    last_real = torch.where(real, at, -1).cummax(1).values
    last_real = torch.nn.functional.pad(last_real[:, :-1], (1, 0), value=-1)
    before = position_ids.gather(1, last_real.clamp(min=0))
    return real & (last_real >= 0) & ((position_ids < before) | (position_ids == 0))


def causal(batch, rows, keys, offset, device, real=None, ends=None) -> torch.Tensor:
    """A CAUSAL mask, or a PADDED one where real is given.

    Args:
        offset: position of the first query among the keys, int or tensor of one int.
        real: bool [batch, keys], false for padding, which nobody sees.
        ends: int [batch, keys], where the sequence of each key ends, if not at the last row.
    """
    first = (torch.arange(keys, device=device) - offset).clamp(min=0, max=rows)
    length = (rows - first if ends is None else (ends - first).clamp(min=0)).expand(batch, keys)
    packed = first + torch.arange(batch, device=device)[:, None] * rows
    if real is None:
        stored = torch.stack((packed, length))
    else:
        stored = torch.stack((packed, torch.where(real, length, 0), real))
    # Row by row in memory, so that a row of all sequences is a view.
    return stored.to(torch.int32).permute(1, 0, 2).unsqueeze(1)


def intervals(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """first and length of a CAUSAL or PADDED mask, int32 [batch * keys]."""
    return mask[:, 0, 0].reshape(-1), mask[:, 0, 1].reshape(-1)


def cut(mask: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """A PADDED mask of as many queries as keys, cut where position ids restart."""
    batch, keys = mask.shape[0], mask.shape[3]
    real = mask[:, 0, 2].bool()
    ends = tokens_before(restarts(position_ids.expand(batch, -1), real))
    return causal(batch, keys, keys, 0, mask.device, real, ends)


def _padding(attention_mask, kv_length, kv_offset):
    missing = kv_length + kv_offset - attention_mask.shape[1]
    real = attention_mask.bool()
    if missing > 0:  # a cache with room for tokens that are still to come
        real = torch.nn.functional.pad(real, (0, missing), value=False)
    return real[:, kv_offset : kv_offset + kv_length]


def _parts(function):
    """The functions inside and_masks(...), or what a remapped one remaps."""
    for cell in function.__closure__ or ():
        value = cell.cell_contents
        if callable(value):
            yield value
        elif isinstance(value, tuple) and all(callable(x) for x in value):
            yield from value


def _causal_or_packed(function) -> bool:
    """Whether a mask function is made of the causal one and of packed sequences, nothing else."""
    if function is masking_utils.causal_mask_function:
        return True
    name = function.__qualname__.split(".")[0]
    if name == "packed_sequence_mask_function":
        return True
    if name not in ("and_masks", "remap_positions_for_packed_sequence"):
        return False
    parts = list(_parts(function))
    return bool(parts) and all(_causal_or_packed(part) for part in parts)


def _packed_ends(function, batch, tokens, device):
    """Where the packed sequences of a causal mask function end, int64 [batch, tokens]."""
    # Neighbours see each other unless a sequence starts between them.
    row = torch.arange(batch, device=device)[:, None]
    head = torch.zeros((), dtype=torch.long, device=device)
    at = torch.arange(tokens, device=device)[None]
    before = (at - 1).clamp(min=0)
    starts = ~function(row, head, at, before).expand(batch, tokens)
    return tokens_before(starts | (at == 0))


def _assert_causal(function, batch, tokens, device) -> None:
    """What can be told of a mask function inside a graph, where closures cannot be looked into:
    that no token sees the one after it."""
    if tokens < 2:
        return
    row = torch.arange(batch, device=device)[:, None]
    head = torch.zeros((), dtype=torch.long, device=device)
    at = torch.arange(tokens - 1, device=device)[None]
    torch._assert_async(
        ~function(row, head, at, at + 1).any(),
        "tree_attn computes causal masks only, and the model asks for another one",
    )


def make_mask(
    *positional, batch_size=None, kv_length=None, q_length=None, q_offset=0, kv_offset=0,
    cache_position=None, mask_function=None, attention_mask=None, local_size=None, use_vmap=False,
    device=None, **others,
):  # fmt: skip
    """transformers' mask function for "tree_attn", of 4.5x (cache_position) and of 5.x."""
    if positional or batch_size is None or kv_length is None:
        raise Unsupported(
            "this version of transformers asks for masks in a way treeattn does not know (expected "
            "keyword arguments batch_size and kv_length); use transformers 4.53 or newer, or tell "
            "treeattn's maintainers about this version"
        )
    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], cache_position[0]
        device = cache_position.device
    for x in (attention_mask, q_offset):
        if device is None and isinstance(x, torch.Tensor):
            device = x.device
    if mask_function is None:
        mask_function = masking_utils.causal_mask_function
    bidirectional = getattr(masking_utils, "bidirectional_mask_function", None)
    if mask_function is bidirectional and bidirectional is not None:
        if attention_mask is None:
            return _bare(FULL, batch_size, device)
        real = _padding(attention_mask, kv_length, kv_offset)
        return real.to(torch.int32)[:, None, None, :]
    if "allow_is_bidirectional_skip" in others:  # windows and overlays of encoders
        others.update(allow_is_bidirectional_skip=False, allow_is_causal_skip=False)
        return masking_utils.sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
            kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
            local_size=local_size, use_vmap=use_vmap, device=device, **others,
        )  # fmt: skip
    if local_size is not None or use_vmap:
        return _bare(OTHER, batch_size, device)
    plain = mask_function is masking_utils.causal_mask_function
    if not plain and torch.compiler.is_compiling():
        _assert_causal(mask_function, batch_size, kv_length, device)
    elif not plain and not _causal_or_packed(mask_function):
        return _bare(OTHER, batch_size, device)
    if _hf_watch.tree_given() and attention_mask is None:
        return _bare(TREE, batch_size, device)
    ends = None if plain else _packed_ends(mask_function, batch_size, kv_length, device)
    real = None if attention_mask is None else _padding(attention_mask, kv_length, kv_offset)
    return causal(batch_size, q_length, kv_length, q_offset - kv_offset, device, real, ends)
