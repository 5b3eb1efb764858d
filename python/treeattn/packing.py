"""Rows of token ids packed into prefix trees, with the maps back: labels, losses, rows, parts."""

from __future__ import annotations

import bisect
import ctypes
import dataclasses
import functools
import itertools
import struct
from collections.abc import Sequence
from typing import NamedTuple

try:
    import numpy as np
except ImportError as error:
    raise ImportError("treeattn.pack needs numpy: pip install numpy") from error

from . import _native
from ._native import InvalidArgument, check, load

_NOTHING_SHARED = np.iinfo(np.int64).max
_REDUCTIONS = ("sum", "token-mean", "row-mean")
# Arrays of a Packed that live on its device.
_ARRAYS = (
    "input_ids", "position_ids", "tree_dfs_order_start_q", "tree_dfs_order_end_k", "cu_seqlens",
    "parents", "row_offsets", "row_positions", "loss_weights",
)  # fmt: skip


class Labels(NamedTuple):
    """What the packed tokens predict: one entry per (position, next token), in order of position.

    A position where rows part has one entry per child; a position where all rows end has none.
    """

    positions: object  #: int64 [labels], packed position whose logits predict the label
    ids: object  #: int64 [labels], token id of the label
    weights: object  #: float32 [labels], weight of its -log p in the loss
    tokens: object  #: int64 [labels], packed position of the label itself


@dataclasses.dataclass(frozen=True)
class Report:
    """What packing saves, counted before anything is computed.

    ``estimated_speedup`` is arithmetic, not a timing: FLOPs of a transformer's layers on the rows
    one by one, over those on the packed trees, with every visited attention tile counted whole.
    """

    rows: int
    trees: int  #: sequences of cu_seqlens
    nodes: int
    row_tokens: int  #: tokens of the rows, one by one
    tokens: int  #: packed tokens
    longest_row: int
    tiles: int  #: attention tiles visited by one head, packed
    row_tiles: int  #: by causal varlen attention on the rows, one by one
    block_m: int
    block_n: int
    estimated_speedup: float

    @property
    def tokens_saved(self) -> int:
        return self.row_tokens - self.tokens

    @property
    def pays(self) -> bool:
        """Whether packing is estimated to be faster than causal varlen attention on the rows."""
        return self.estimated_speedup > 1.0

    def __str__(self) -> str:
        ratio = self.row_tokens / self.tokens if self.tokens else 1.0
        tile_ratio = self.row_tiles / self.tiles if self.tiles else 1.0
        if self.tokens_saved == 0:
            verdict = "nothing is shared"
        else:
            verdict = "sharing pays" if self.pays else "sharing does not pay: use share=False"
        return (
            f"{self.rows} rows in {self.trees} trees of {self.nodes} nodes; longest row "
            f"{self.longest_row}\n"
            f"tokens {self.tokens} instead of {self.row_tokens} ({ratio:.2f}x)\n"
            f"attention tiles {self.block_m} x {self.block_n}: {self.tiles} instead of "
            f"{self.row_tiles} ({tile_ratio:.2f}x)\n"
            f"estimated speed-up {self.estimated_speedup:.2f}x: {verdict}"
        )


class Packed:
    """A batch of rows packed into prefix trees. Made by :func:`pack`; not to be changed.

    Arrays are numpy's, or torch tensors on ``device`` if the batch was given one.

    Attributes:
        input_ids: int64 [tokens], in depth-first order; siblings in order of first appearance.
        position_ids: int64 [tokens], number of tokens above, as in the token's own row.
        tree_dfs_order_start_q, tree_dfs_order_end_k: int32 [tokens], numbered through all trees.
        cu_seqlens: int32 [trees + 1]; each tree is a sequence, so that its numbers do not depend
            on its neighbours.
        parents: int64 [tokens], packed position of the token before; -1 for the first of a tree.
        row_offsets: int64 [rows + 1], row r is ``row_positions[row_offsets[r]:row_offsets[r+1]]``.
        row_positions: int64 [row tokens], packed position of every token of every row;
            ``x[row_positions]`` unpacks any x [tokens, ...] into the rows, one after the other.
        row_ids: numpy int64 [rows], numbers of these rows in the batch that was packed first.
        loss_weights: float32 [tokens], what -log p(token | its ancestors) weighs in the loss: its
            weight summed over the rows that go through it; 0 for the first token of a tree.
        device: torch.device or None.
    """

    def __init__(self, host: _Host, device=None):
        self._host = host
        self.device = None
        for name in _ARRAYS:
            setattr(self, name, getattr(host, name))
        self.row_ids = host.row_ids
        if device is not None:
            import torch

            for name in _ARRAYS:
                setattr(self, name, torch.from_numpy(getattr(host, name)).to(device))
            self.device = self.input_ids.device

    def __repr__(self) -> str:
        host = self._host
        return (
            f"Packed(rows={self.num_rows}, trees={host.cu_seqlens.size - 1}, "
            f"tokens={self.num_tokens} of {host.row_positions.size}, device={self.device})"
        )

    @property
    def num_rows(self) -> int:
        return self._host.row_ids.size

    @property
    def num_tokens(self) -> int:
        return self._host.input_ids.size

    def to(self, device) -> Packed:
        """The same batch with torch tensors on a device, or numpy arrays for None."""
        return Packed(self._host, device)

    @functools.cached_property
    def plan(self):
        """The :class:`treeattn.Plan` of the batch, on its device (the CPU for numpy arrays)."""
        from . import plan

        known = {} if self.device is None else {"position_ids": self.position_ids}
        return plan(
            self.cu_seqlens,
            tree_dfs_order_start_q=self.tree_dfs_order_start_q,
            tree_dfs_order_end_k=self.tree_dfs_order_end_k,
            **known,
        )

    def model_inputs(self) -> dict:
        """Keyword arguments for a transformers model with ``attn_implementation="tree_attn"``
        (:func:`treeattn.register`): ids and positions [1, tokens] and the plan. Its logits
        [1, tokens, vocabulary] go to :meth:`loss` or :meth:`token_log_probs`."""
        here = self if self.device is not None else self.to("cpu")
        return {
            "input_ids": here.input_ids[None],
            "position_ids": here.position_ids[None],
            "tree_plan": here.plan,
            "use_cache": False,
        }

    def with_weights(
        self, *, row_weights=None, loss_mask=None, prompt_lengths=None, reduction: str = "sum"
    ) -> Packed:
        """The same batch with other loss weights; the arguments are those of :func:`pack`."""
        host = self._host.weighted(row_weights, loss_mask, prompt_lengths, reduction)
        return Packed(host, self.device)

    def labels(self, keep_zeros: bool = False) -> Labels:
        """Positions, token ids and weights of the labels, for a loss of one's own or a fused one.

        With ``hidden`` [tokens, dim], ``hidden[labels.positions]`` are the rows to be classified;
        no label is dropped where rows part. Labels of weight 0 are left out unless ``keep_zeros``.
        """
        if keep_zeros:
            return self._all_labels
        tokens = self._host.label_tokens
        return self._labels_of(tokens[self._host.loss_weights[tokens] != 0])

    @functools.cached_property
    def _all_labels(self) -> Labels:
        return self._labels_of(self._host.label_tokens)

    def _labels_of(self, tokens) -> Labels:
        host = self._host
        labels = (host.parents[tokens], host.input_ids[tokens], host.loss_weights[tokens], tokens)
        if self.device is not None:
            import torch

            labels = (torch.from_numpy(x).to(self.device) for x in labels)
        return Labels(*labels)

    def token_log_probs(self, logits):
        """log p(token | its ancestors) of every packed token, differentiable.

        Args:
            logits: [tokens, vocabulary] or [1, tokens, vocabulary], a torch tensor of any floating
                type; sums are in float32 (float64 for float64).

        Returns:
            [tokens] float32 or float64; 0 for the first token of a tree, which nothing predicts.
            ``unpack`` gives the rows' own: entry i of a row is that of its token i. The gradient
            is made in logits' type without a copy of logits in float32.
        """
        if self.device != logits.device:
            place = "in numpy arrays" if self.device is None else f"on {self.device}"
            raise InvalidArgument(
                f"the batch is {place}, expected {logits.device} as logits: use .to(logits.device)"
            )
        if logits.dim() == 3 and logits.shape[0] == 1:
            logits = logits[0]
        if logits.dim() != 2 or logits.shape[0] != self.num_tokens:
            raise InvalidArgument(
                f"logits is {list(logits.shape)}, expected [{self.num_tokens}, vocabulary] as the "
                "packed tokens; do not shift or slice them"
            )
        from ._log_probs import LabelLogProbs

        self._host.check_ids(logits.shape[1])
        labels = self._all_labels
        positions = self._host.parents[self._host.label_tokens]
        chosen = LabelLogProbs.apply(logits, labels.positions, labels.ids, positions)
        return chosen.new_zeros(self.num_tokens).index_put((labels.tokens,), chosen)

    def loss(self, logits):
        """Sum of ``loss_weights`` times -log p(token | its ancestors): a scalar, differentiable.

        Equals the rows' loss without packing under the weights and the reduction of :func:`pack`.
        """
        log_probs = self.token_log_probs(logits)
        return -(log_probs * self.loss_weights.to(log_probs.dtype)).sum()

    def unpack(self, x) -> list:
        """The rows' values of x [tokens, ...]: one [row length, ...] per row, differentiable."""
        self._check_tokens(x)
        offsets = self._host.row_offsets
        flat = x[self.row_positions]
        return [flat[a:b] for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist())]

    def unpack_padded(self, x, value=0):
        """The rows' values of x [tokens, ...] as one [rows, longest row, ...], padded on the right
        with ``value``; differentiable."""
        self._check_tokens(x)
        lengths = np.diff(self._host.row_offsets)
        rows = np.repeat(np.arange(lengths.size), lengths)
        columns = np.arange(rows.size) - np.repeat(self._host.row_offsets[:-1], lengths)
        shape = (lengths.size, int(lengths.max(initial=0)), *x.shape[1:])
        if self.device is None:
            out = np.full(shape, value, dtype=x.dtype)
            out[rows, columns] = x[self.row_positions]
            return out
        import torch

        rows, columns = (torch.from_numpy(i).to(self.device) for i in (rows, columns))
        return x.new_full(shape, value).index_put((rows, columns), x[self.row_positions])

    def _check_tokens(self, x) -> None:
        if len(x.shape) == 0 or x.shape[0] != self.num_tokens:
            raise InvalidArgument(
                f"x is {list(x.shape)}, expected [{self.num_tokens}, ...] as the packed tokens"
            )

    def select(self, rows) -> Packed:
        """These rows (numbers in this batch) packed by themselves, with the weights they have."""
        return Packed(self._host.select(_integers("rows", rows)), self.device)

    def partition(self, max_tokens: int, split: bool = True) -> list[Packed]:
        """Splits the batch into parts of at most ``max_tokens`` packed tokens each.

        Trees that fit stay whole and are spread over as few parts as best-fit finds. A larger tree
        is split between rows, its ancestors repeated in each part. Every row is in one part, with
        the loss weights it has here: the parts' losses sum to the loss of the whole, and no row's
        token is counted twice.

        Args:
            max_tokens: packed tokens, at least the longest row.
            split: False refuses trees that are larger than that.

        Returns:
            Parts in order of their first row; ``part.row_ids`` says which rows are in it.

        Raises:
            InvalidArgument: a row, or without ``split`` a tree, has more than ``max_tokens``.
        """
        groups = self._host.partition(max_tokens, split)
        return [Packed(self._host.select(rows), self.device) for rows in groups]

    def report(self, hidden_size: int = 4096, block_m: int = 128, block_n: int = 128) -> Report:
        """Says what sharing saves before anything is computed.

        Args:
            hidden_size: of the model whose speed-up is estimated; the larger, the less attention
                weighs beside the linear layers (24 hidden_size^2 FLOPs per token and layer).
            block_m, block_n: query and key tokens of an attention tile.
        """
        return self._host.report(hidden_size, block_m, block_n)


def pack(
    rows,
    lengths=None,
    *,
    attention_mask=None,
    row_weights=None,
    loss_mask=None,
    prompt_lengths=None,
    reduction: str = "sum",
    share: bool = True,
    min_shared: int = 1,
    max_shared=None,
    device=None,
) -> Packed:
    """Packs rows of token ids into prefix trees: a prefix that rows share is stored once.

    Any order of rows gives the same trees up to the order of siblings. Rows that are a prefix of
    another, equal rows and empty rows are legal; each keeps its own place in the maps back.

    Args:
        rows: the token ids, integers. One of
            a sequence of rows, each a list, numpy array or torch tensor of one dimension;
            [total] with ``lengths``, the rows one after the other;
            [rows, longest], with ``attention_mask`` where rows are padded (on either side).
        lengths: [rows], tokens of each row of flat input.
        attention_mask: [rows, longest], nonzero where a token counts.
        row_weights: [rows], weight of each row in the loss; default 1. May be negative.
        loss_mask: weight of each token as a label, in the layout of ``rows``; default 1. A row's
            first token is never a label.
        prompt_lengths: [rows] or one int: so many leading tokens of a row are no labels.
        reduction: "sum": loss = sum over rows of row_weights[r] * sum over tokens of
            loss_mask * -log p. "token-mean": the same divided by the sum of loss_mask over all
            labels. "row-mean": each row is divided by its own sum of loss_mask, the whole by the
            number of rows.
        share: False keeps every row apart: plain causal varlen attention on the rows.
        min_shared: prefixes of fewer tokens are not shared, so that a common first token does not
            make one tree of the batch.
        max_shared: [rows] or one int: only so many leading tokens of a row are shared. The
            prompts' lengths keep answers apart that happen to begin alike.
        device: where torch tensors are wanted; None: numpy arrays.

    Raises:
        InvalidArgument: token ids that are no integers, lengths or layouts that do not agree, an
            unknown reduction, options out of range.
    """
    tokens, offsets, padding = _read_rows(rows, lengths, attention_mask)
    count = offsets.size - 1
    if not share:
        min_shared = _NOTHING_SHARED
    if max_shared is not None:
        max_shared = _per_row("max_shared", max_shared, count, np.int64)
    row_ids = np.arange(count)
    host = _Host.build(tokens, offsets, int(min_shared), max_shared, row_ids)
    host.padding = padding
    host = host.weighted(row_weights, loss_mask, prompt_lengths, reduction)
    return Packed(host, device)


class _Host:
    """What a Packed knows on the host, in numpy arrays."""

    padding = None  # [rows, longest] bool, where the rows came padded
    token_weights: np.ndarray  # [row tokens], of each row's tokens as labels
    loss_weights: np.ndarray

    @classmethod
    def build(cls, tokens, offsets, min_shared: int, max_shared, row_ids) -> _Host:
        self = cls()
        self.min_shared, self.max_shared, self.row_ids = min_shared, max_shared, row_ids
        self.row_offsets = offsets
        library = load()
        options = _native.PackOptions(
            min_shared=min_shared, max_shared=None if max_shared is None else _address(max_shared)
        )
        handle = ctypes.c_void_p()
        count = offsets.size - 1
        check(
            library.treeattn_pack_rows_with_options(
                _address(tokens), _address(offsets), count, options, ctypes.byref(handle)
            )
        )
        try:
            total, nodes = ctypes.c_int64(), ctypes.c_int64()
            check(library.treeattn_packed_size(handle, total, nodes))
            total, nodes = total.value, nodes.value
            self.input_ids = np.empty(total, np.int64)
            depths = np.empty(total, np.int32)
            self.tree_dfs_order_start_q = np.empty(total, np.int32)
            self.tree_dfs_order_end_k = np.empty(total, np.int32)
            self.row_positions = np.empty(tokens.size, np.int64)
            self.node_parents = np.empty(nodes, np.int64)
            self.node_lengths = np.empty(nodes, np.int64)
            self.row_nodes = np.empty(count, np.int64)
            copied = (
                self.input_ids, depths, self.tree_dfs_order_start_q, self.tree_dfs_order_end_k,
                self.row_positions,
            )  # fmt: skip
            check(library.treeattn_packed_copy(handle, *map(_address, copied)))
            copied = (self.node_parents, self.node_lengths, self.row_nodes)
            check(library.treeattn_packed_copy_nodes(handle, *map(_address, copied)))
        finally:
            library.treeattn_packed_destroy(handle)
        self.position_ids = depths.astype(np.int64)
        self.node_offsets = _offsets(self.node_lengths)
        roots = np.flatnonzero(self.node_parents < 0)
        self.cu_seqlens = np.append(self.node_offsets[roots], total).astype(np.int32)
        self.parents = np.arange(-1, total - 1)
        below = np.flatnonzero(self.node_parents >= 0)
        self.parents[self.node_offsets[roots]] = -1
        last = self.node_offsets[1:] - 1
        self.parents[self.node_offsets[below]] = last[self.node_parents[below]]
        return self

    @functools.cached_property
    def label_tokens(self):
        """Packed tokens that are predicted, in order of the positions that predict them."""
        tokens = np.flatnonzero(self.parents >= 0)
        return tokens[np.argsort(self.parents[tokens], kind="stable")]

    def check_ids(self, vocabulary: int) -> None:
        ids = self.input_ids
        if ids.size and (ids.min() < 0 or ids.max() >= vocabulary):
            t = int(((ids < 0) | (ids >= vocabulary)).argmax())
            raise InvalidArgument(
                f"token {t} has id {ids[t]}, expected one from 0 to {vocabulary - 1} as the "
                "logits' vocabulary"
            )

    def weighted(self, row_weights, loss_mask, prompt_lengths, reduction: str) -> _Host:
        if reduction not in _REDUCTIONS:
            raise InvalidArgument(f"reduction is {reduction!r}, expected one of {_REDUCTIONS}")
        count, offsets = self.row_offsets.size - 1, self.row_offsets
        lengths = np.diff(offsets)
        if loss_mask is None:
            weights = np.ones(self.row_positions.size)
        else:
            weights = _like_rows("loss_mask", loss_mask, offsets, self.padding)
        if prompt_lengths is not None:
            prompts = _per_row("prompt_lengths", prompt_lengths, count, np.int64)
            depth = np.arange(weights.size) - np.repeat(offsets[:-1], lengths)
            weights[depth < np.repeat(prompts, lengths)] = 0
        weights[offsets[:-1][lengths > 0]] = 0
        if not np.isfinite(weights).all():
            raise InvalidArgument("loss_mask has a value that is not finite")
        scale = np.ones(count)
        if row_weights is not None:
            scale = _per_row("row_weights", row_weights, count, np.float64)
            if not np.isfinite(scale).all():
                raise InvalidArgument("row_weights has a value that is not finite")
        if reduction == "token-mean":
            scale = scale / (weights.sum() or 1.0)
        elif reduction == "row-mean":
            sums = np.bincount(np.repeat(np.arange(count), lengths), weights, minlength=count)
            scale = scale / np.where(sums == 0, 1.0, sums) / max(count, 1)
        if row_weights is not None or reduction != "sum":
            weights *= np.repeat(scale, lengths)
        return self._with_token_weights(weights)

    def _with_token_weights(self, weights) -> _Host:
        made = _Host.__new__(_Host)
        made.__dict__.update(self.__dict__)
        made.token_weights = weights
        made.loss_weights = np.bincount(
            self.row_positions, weights, minlength=self.input_ids.size
        ).astype(np.float32)
        return made

    def select(self, rows) -> _Host:
        count = self.row_offsets.size - 1
        bad = np.flatnonzero((rows < 0) | (rows >= count))
        if bad.size:
            raise InvalidArgument(
                f"rows[{bad[0]}] is {rows[bad[0]]}, expected a row number from 0 to {count - 1}"
            )
        offsets = _offsets(np.diff(self.row_offsets)[rows])
        at = _ranges(self.row_offsets[rows], offsets)
        tokens = self.input_ids[self.row_positions[at]]
        max_shared = None if self.max_shared is None else self.max_shared[rows]
        made = _Host.build(tokens, offsets, self.min_shared, max_shared, self.row_ids[rows])
        return made._with_token_weights(self.token_weights[at])

    def partition(self, max_tokens: int, split: bool) -> list[np.ndarray]:
        lengths = np.diff(self.row_offsets)
        longest = int(lengths.argmax()) if lengths.size else 0
        if lengths.size and lengths[longest] > max_tokens:
            raise InvalidArgument(
                f"row {longest} has {lengths[longest]} tokens, expected at most max_tokens = "
                f"{max_tokens}: shorten the row or raise max_tokens"
            )
        units = self._units(max_tokens, split)
        units.sort(key=lambda unit: (-unit[0], unit[1][0]))
        parts: list[list[np.ndarray]] = []
        room: list[tuple[int, int]] = []  # (free tokens, part), ascending
        for size, rows in units:
            at = bisect.bisect_left(room, (size, -1))
            if at == len(room):
                free, part = max_tokens, len(parts)
                parts.append([])
            else:
                free, part = room.pop(at)
            parts[part].append(rows)
            bisect.insort(room, (free - size, part))
        groups = [np.sort(np.concatenate(part)) for part in parts]
        groups.sort(key=lambda rows: rows[0])
        empty = np.flatnonzero(lengths == 0)
        if empty.size:
            groups[:1] = [np.sort(np.concatenate([*groups[:1], empty]))]
        return groups

    def _units(self, max_tokens: int, split: bool) -> list[tuple[int, np.ndarray]]:
        """(packed tokens, rows) of each tree, or of the pieces of trees that are too large."""
        order = np.argsort(self.row_nodes, kind="stable")
        order = order[self.row_nodes[order] >= 0]  # depth-first, empty rows left out
        roots = np.flatnonzero(self.node_parents < 0)
        first = np.searchsorted(self.row_nodes[order], roots)
        bounds = [*first.tolist(), order.size]
        sizes = np.diff(self.cu_seqlens).tolist()
        units = []
        for tree, size in enumerate(sizes):
            rows = order[bounds[tree] : bounds[tree + 1]]
            if size <= max_tokens:
                units.append((size, rows))
            elif split:
                units += self._pieces(rows, max_tokens)
            else:
                raise InvalidArgument(
                    f"the tree of row {rows.min()} has {size} tokens, expected at most max_tokens "
                    f"= {max_tokens}: raise it, or let trees be split (split=True)"
                )
        return units

    def _pieces(self, rows, max_tokens: int) -> list[tuple[int, np.ndarray]]:
        """Runs of rows, in depth-first order, whose union has at most max_tokens tokens."""
        pieces = []
        begin, size = 0, 0
        lengths = np.diff(self.row_offsets)[rows].tolist()
        for n, length in enumerate(lengths):
            new = length - (self._common(rows[n - 1], rows[n]) if n > begin else 0)
            if size + new > max_tokens:
                pieces.append((size, rows[begin:n]))
                begin, size, new = n, 0, length
            size += new
        pieces.append((size, rows[begin:]))
        return pieces

    def _common(self, a: int, b: int) -> int:
        """Shared tokens of row a and a row b that comes after it in depth-first order."""
        a, b = int(self.row_nodes[a]), int(self.row_nodes[b])
        # Subtrees are ranges: b's first ancestor that does not come after a is an ancestor of a.
        while b > a:
            b = int(self.node_parents[b])
        return int(self.position_ids[self.node_offsets[b + 1] - 1]) + 1

    def report(self, hidden_size: int, block_m: int, block_n: int) -> Report:
        lengths = np.diff(self.row_offsets)
        tiles = self._visited_tiles(block_m, block_n)
        row_tiles = _causal_tiles(lengths, block_m, block_n)
        linear, tile = 24 * hidden_size**2, 4 * hidden_size * block_m * block_n
        tokens, row_tokens = self.input_ids.size, self.row_positions.size
        flops = tokens * linear + tiles * tile
        return Report(
            rows=lengths.size,
            trees=self.cu_seqlens.size - 1,
            nodes=self.node_lengths.size,
            row_tokens=row_tokens,
            tokens=tokens,
            longest_row=int(lengths.max(initial=0)),
            tiles=tiles,
            row_tiles=row_tiles,
            block_m=block_m,
            block_n=block_n,
            estimated_speedup=(row_tokens * linear + row_tiles * tile) / flops if flops else 1.0,
        )

    def _visited_tiles(self, block_m: int, block_n: int) -> int:
        """Tiles start where a tree starts. The rows that see a key are one range, from itself to
        the end of its node's subtree; so are the query tiles that visit a key tile."""
        if not self.input_ids.size:
            return 0
        starts = self.cu_seqlens[:-1].astype(np.int64)
        counts = -(-np.diff(self.cu_seqlens).astype(np.int64) // block_n)
        offsets = _offsets(counts)
        first = np.repeat(starts, counts)
        key0 = first + block_n * (np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts))
        last_row = self.node_offsets[self.tree_dfs_order_end_k + 1] - 1
        highest = np.maximum.reduceat(last_row, key0)
        return int(((highest - first) // block_m - (key0 - first) // block_m + 1).sum())


def _causal_tiles(lengths, block_m: int, block_n: int) -> int:
    """Tiles that causal attention visits on sequences of these lengths."""
    longest = int(lengths.max(initial=0))
    whole = np.arange(longest // block_m + 1)
    below = _offsets(-(-(whole + 1) * block_m // block_n))  # of the first n whole query tiles
    last = np.where(lengths % block_m > 0, -(-lengths // block_n), 0)
    return int((below[lengths // block_m] + last).sum())


def _address(array: np.ndarray) -> int | None:
    return array.ctypes.data if array.size else None


def _offsets(lengths) -> np.ndarray:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _ranges(starts, offsets) -> np.ndarray:
    """starts[0], starts[0] + 1, ... then starts[1], ...: range n has offsets' n-th length."""
    lengths = np.diff(offsets)
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)


def _array(x) -> np.ndarray:
    """A numpy array of x, which may be a torch tensor anywhere."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        return x.float().numpy() if str(x.dtype) == "torch.bfloat16" else x.numpy()
    return np.asarray(x)


def _is_array(x) -> bool:
    return isinstance(x, np.ndarray) or hasattr(x, "detach")


def _is_row(x) -> bool:
    try:
        len(x)
    except TypeError:
        return False
    return True


def _integers(name: str, x) -> np.ndarray:
    """x as contiguous int64 of one dimension."""
    x = _array(x)
    if x.ndim != 1 or (x.size and x.dtype.kind not in "iu"):
        raise InvalidArgument(
            f"{name} is {list(x.shape)} of {x.dtype}, expected integers in one dimension"
        )
    return np.ascontiguousarray(x, np.int64)


def _per_row(name: str, x, count: int, dtype) -> np.ndarray:
    x = _array(x)
    if x.size and x.dtype.kind not in ("iu" if dtype == np.int64 else "iufb"):
        expected = "integers" if dtype == np.int64 else "numbers"
        raise InvalidArgument(f"{name} is of {x.dtype}, expected {expected}")
    if x.ndim == 0:
        x = np.full(count, x)
    if x.shape != (count,):
        raise InvalidArgument(f"{name} is {list(x.shape)}, expected one value per row: [{count}]")
    return np.ascontiguousarray(x, dtype)


def _read_rows(rows, lengths, attention_mask):
    """tokens int64 [total], offsets int64 [rows + 1], and the mask of padded rows or None."""
    if lengths is not None:
        if attention_mask is not None:
            raise InvalidArgument("lengths and attention_mask were given, expected one of them")
        tokens = _integers("rows", rows)
        lengths = _integers("lengths", lengths)
        if (lengths < 0).any():
            bad = int((lengths < 0).argmax())
            raise InvalidArgument(f"lengths[{bad}] is {lengths[bad]}, expected at least 0")
        offsets = _offsets(lengths)
        if offsets[-1] != tokens.size:
            raise InvalidArgument(
                f"lengths sum to {offsets[-1]}, expected {tokens.size}, the tokens of rows"
            )
        return tokens, offsets, None
    if _is_array(rows):
        rows = _array(rows)
        if rows.ndim != 2:
            raise InvalidArgument(
                f"rows is {list(rows.shape)}, expected [rows, longest], or one dimension with "
                "lengths"
            )
        if attention_mask is None:
            return _integers("rows", rows.reshape(-1)), _offsets([rows.shape[1]] * len(rows)), None
        mask = _array(attention_mask)
        if mask.shape != rows.shape:
            raise InvalidArgument(
                f"attention_mask is {list(mask.shape)}, expected {list(rows.shape)} as rows"
            )
        mask = mask != 0
        return _integers("rows", rows[mask]), _offsets(mask.sum(1)), mask
    if attention_mask is not None:
        raise InvalidArgument("attention_mask was given, expected rows as [rows, longest]")
    rows = rows if isinstance(rows, Sequence) else list(rows)
    try:
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    except TypeError:
        r = next(r for r, row in enumerate(rows) if not _is_row(row))
        raise InvalidArgument(
            f"rows[{r}] is {rows[r]!r}, expected a row of token ids, or lengths beside flat tokens"
        ) from None
    return _join("rows", rows, np.int64), _offsets(lengths), None


def _like_rows(name: str, x, offsets, padding) -> np.ndarray:
    """x, numbers in the layout of the rows, as float64 [row tokens]."""
    lengths = np.diff(offsets)
    total = int(offsets[-1])
    if not _is_array(x) and len(x) and _is_row(x[0]):
        given = np.fromiter(map(len, x), np.int64, len(x))
        if given.shape != lengths.shape:
            raise InvalidArgument(f"{name} has {given.size} rows, expected {lengths.size}")
        if (given != lengths).any():
            r = int((given != lengths).argmax())
            raise InvalidArgument(
                f"{name}[{r}] has {given[r]} elements, expected {lengths[r]} as row {r}"
            )
        return _join(name, x, np.float64)
    x = _array(x)
    if x.dtype.kind not in "iufb" and x.size:
        raise InvalidArgument(f"{name} is of {x.dtype}, expected numbers")
    if padding is not None and x.shape == padding.shape:
        x = x[padding]
    elif x.ndim == 2 and len(x) == lengths.size and (lengths == x.shape[1]).all():
        x = x.reshape(-1)
    if x.shape != (total,):
        raise InvalidArgument(
            f"{name} is {list(x.shape)}, expected the layout of rows, or [{total}] as their tokens"
        )
    return x.astype(np.float64)


def _join(name: str, rows: Sequence, dtype) -> np.ndarray:
    """The rows one after the other, as int64 or float64."""
    kinds = set(map(type, rows))
    if kinds <= {list, tuple}:
        return _join_lists(name, rows, dtype)
    full = [row for row in rows if len(row)]  # an empty one has no type to speak of
    for row in full:
        if getattr(row, "ndim", 1) != 1:
            r = next(r for r, x in enumerate(rows) if x is row)
            raise InvalidArgument(f"{name}[{r}] is {list(row.shape)}, expected one dimension")
    if full and all(hasattr(row, "detach") for row in full):
        import torch

        flat = _array(torch.cat([row.detach() for row in full]))
    elif full:
        flat = np.concatenate(full if kinds == {np.ndarray} else [_array(row) for row in full])
    else:
        return np.zeros(0, dtype)
    if flat.dtype.kind not in ("iu" if dtype == np.int64 else "iufb"):
        expected = "integers" if dtype == np.int64 else "numbers"
        raise InvalidArgument(f"{name} has elements of {flat.dtype}, expected {expected}")
    return flat.astype(dtype, copy=False)


def _join_lists(name: str, rows: Sequence, dtype) -> np.ndarray:
    total = sum(map(len, rows))
    flat = np.empty(total, dtype)
    code = "q" if dtype == np.int64 else "d"
    # struct is the fastest way from lists to an array, and takes no float for an integer.
    try:
        if total < 32 * len(rows):
            struct.pack_into(f"{total}{code}", flat, 0, *itertools.chain.from_iterable(rows))
        else:
            at = 0
            for row in rows:
                struct.pack_into(f"{len(row)}{code}", flat, 8 * at, *row)
                at += len(row)
    except struct.error:
        for r, row in enumerate(rows):
            for t, x in enumerate(row):
                try:
                    struct.pack(code, x)
                except struct.error:
                    kind = "an integer of 64 bits" if code == "q" else "a number"
                    raise InvalidArgument(f"{name}[{r}][{t}] is {x!r}, expected {kind}") from None
        raise
    return flat
