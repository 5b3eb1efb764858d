"""pack: trees, maps back, labels, loss weights, report and parts, against plain Python."""

import math
import os
import pickle
import random

import pytest

np = pytest.importorskip("numpy")
if not os.environ.get("TREEATTN_LIBRARY"):
    pytest.skip("TREEATTN_LIBRARY names no library", allow_module_level=True)

from treeattn import InvalidArgument  # noqa: E402
from treeattn.packing import pack  # noqa: E402

ROWS = [[5, 6, 7, 1, 2], [5, 6, 7, 3], [5, 6, 7, 1, 4]]


class Reference:
    """What pack must return, from a trie of dicts: tokens with equal keys are stored once."""

    def __init__(self, rows, min_shared=1, max_shared=None):
        self.rows = rows
        limits = max_shared or [len(row) for row in rows]
        keys = []  # of each token of each row
        for r, row in enumerate(rows):
            limit = min(limits[r], len(row))
            group = tuple(row[:min_shared]) if limit >= min_shared else ("alone", r)
            keys.append([])
            for t in range(len(row)):
                private = ("own", r) if t >= limit else ()
                keys[r].append((group, tuple(row[: t + 1]), private))
        self.tokens, self.parents, self.depths, at = [], [], [], {}
        children, roots = {}, []
        for r, row in enumerate(rows):
            for t in range(len(row)):
                if keys[r][t] in children:
                    continue
                children[keys[r][t]] = []
                (children[keys[r][t - 1]] if t else roots).append((keys[r][t], row[t], t))

        def visit(entries, parent):
            stack = [(entry, parent) for entry in reversed(entries)]
            while stack:
                (key, token, depth), above = stack.pop()
                at[key] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(above)
                self.depths.append(depth)
                stack += [(entry, at[key]) for entry in reversed(children[key])]

        visit(roots, -1)
        self.positions = [[at[key] for key in row] for row in keys]

    def visible(self):
        """[query, key] bool: a token sees itself and its ancestors."""
        seen = np.zeros((len(self.tokens),) * 2, bool)
        for q, parent in enumerate(self.parents):
            if parent >= 0:
                seen[q] = seen[parent]
            seen[q, q] = True
        return seen


def mask_of(packed):
    """The mask that the arrays stand for, sequence by sequence."""
    total = packed.num_tokens
    start, end = packed.tree_dfs_order_start_q, packed.tree_dfs_order_end_k
    at = np.arange(total)
    tree = np.searchsorted(packed.cu_seqlens, at, side="right")
    seen = (at[None] <= at[:, None]) & (start[:, None] <= end[None])
    return seen & (tree[:, None] == tree[None])


def positions_of(packed):
    return [x.tolist() for x in np.split(packed.row_positions, packed.row_offsets[1:-1])]


def check(packed, reference):
    assert packed.input_ids.tolist() == reference.tokens
    assert packed.position_ids.tolist() == reference.depths
    assert packed.parents.tolist() == reference.parents
    if reference.rows:
        assert positions_of(packed) == reference.positions
    np.testing.assert_array_equal(mask_of(packed), reference.visible())
    roots = [t for t, parent in enumerate(reference.parents) if parent < 0]
    starts = packed.cu_seqlens.tolist()
    assert starts[0] == 0 and starts[-1] == len(reference.tokens)
    assert set(starts[:-1]) <= set(roots)


def random_rows(rng):
    rows = [
        [rng.randrange(rng.randint(1, 3)) for _ in range(rng.randrange(12))]
        for _ in range(rng.randrange(14))
    ]
    for _ in range(rng.randrange(4)):  # duplicates and prefixes
        if rows:
            row = rng.choice(rows)
            rows.insert(rng.randrange(len(rows) + 1), row[: rng.randrange(len(row) + 1)])
    return rows


def random_options(rng, rows):
    options = {}
    if rng.random() < 0.5:
        options["min_shared"] = rng.randint(1, 5)
    if rng.random() < 0.5:
        options["max_shared"] = [rng.randrange(9) for _ in rows]
    return options


def test_shared_tokens_are_stored_once_with_the_maps_back():
    packed = pack(ROWS)
    assert packed.input_ids.tolist() == [5, 6, 7, 1, 2, 4, 3]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 4, 4, 3]
    assert packed.parents.tolist() == [-1, 0, 1, 2, 3, 3, 2]
    assert packed.tree_dfs_order_start_q.tolist() == [0, 0, 0, 1, 2, 3, 4]
    assert packed.tree_dfs_order_end_k.tolist() == [4, 4, 4, 3, 2, 3, 4]
    assert packed.cu_seqlens.tolist() == [0, 7]
    assert positions_of(packed) == [[0, 1, 2, 3, 4], [0, 1, 2, 6], [0, 1, 2, 3, 5]]
    assert [packed.num_rows, packed.num_tokens] == [3, 7]


@pytest.mark.parametrize("seed", range(20))
def test_random_rows_give_the_tree_of_a_plain_trie(seed):
    rng = random.Random(seed)
    for _ in range(40):
        rows = random_rows(rng)
        options = random_options(rng, rows)
        check(pack(rows, **options), Reference(rows, **options))


def test_every_kind_of_input_packs_alike():
    flat = [t for row in ROWS for t in row]
    lengths = [len(row) for row in ROWS]
    padded = np.zeros((3, 5), np.int32)
    left = np.zeros((3, 5), np.int64)
    mask, left_mask = np.zeros((3, 5), bool), np.zeros((3, 5), np.int64)
    for r, row in enumerate(ROWS):
        padded[r, : len(row)], mask[r, : len(row)] = row, True
        left[r, 5 - len(row) :], left_mask[r, 5 - len(row) :] = row, 1
    inputs = [
        pack([np.array(row, np.int16) for row in ROWS]),
        pack((row for row in ROWS)),
        pack([ROWS[0], np.array(ROWS[1]), tuple(ROWS[2])]),
        pack(flat, lengths),
        pack(np.array(flat, np.uint8), np.array(lengths, np.int32)),
        pack(padded, attention_mask=mask),
        pack(left, attention_mask=left_mask),
    ]
    for packed in inputs:
        check(packed, Reference(ROWS))
    check(pack(np.array([ROWS[0], ROWS[2]])), Reference([ROWS[0], ROWS[2]]))


def test_short_and_long_lists_are_read_alike():
    rows = [[n, 2**62, -n] for n in range(5)]
    check(pack(rows), Reference(rows))
    rows = [list(range(-40, 60)), list(range(-40, 50)) + [2**62]]
    check(pack(rows), Reference(rows))


def test_a_prefix_of_a_row_adds_no_token_and_keeps_its_place():
    packed = pack([[1, 2], [1, 2, 3], [1], [1, 2, 3]])
    assert packed.input_ids.tolist() == [1, 2, 3]
    assert positions_of(packed) == [[0, 1], [0, 1, 2], [0], [0, 1, 2]]
    # Token 2 is the label of three rows' second token, token 3 of two rows' third.
    assert packed.loss_weights.tolist() == [0, 3, 2]


def test_equal_rows_are_one_chain_that_weighs_more():
    packed = pack([[1, 2, 3]] * 5)
    assert packed.num_tokens == 3
    assert packed.loss_weights.tolist() == [0, 5, 5]
    assert packed.report().tokens_saved == 12


def test_one_row_is_a_chain():
    packed = pack([[4, 4, 4]])
    check(packed, Reference([[4, 4, 4]]))
    assert packed.cu_seqlens.tolist() == [0, 3]
    report = packed.report()
    assert (report.tokens_saved, report.pays, report.estimated_speedup) == (0, False, 1.0)


@pytest.mark.parametrize("rows", [[], [[]], [[], [], []]])
def test_nothing_packs_to_nothing(rows):
    packed = pack(rows)
    assert packed.num_tokens == 0 and packed.num_rows == len(rows)
    assert packed.cu_seqlens.tolist() == [0]
    assert packed.row_offsets.tolist() == [0] * (len(rows) + 1)
    assert [x.tolist() for x in packed.unpack(np.zeros((0, 3)))] == [[]] * len(rows)
    assert packed.unpack_padded(np.zeros((0, 3))).shape == (len(rows), 0, 3)
    assert packed.report().tiles == 0
    parts = packed.partition(4)
    assert [row for part in parts for row in part.row_ids.tolist()] == list(range(len(rows)))


def test_empty_rows_keep_their_place():
    packed = pack([[], [1, 2], [], [1, 3]])
    assert positions_of(packed) == [[], [0, 1], [], [0, 2]]


def test_trees_are_sequences_of_their_own():
    packed = pack([[1, 2], [7, 8, 9], [1, 3]])
    assert packed.input_ids.tolist() == [1, 2, 3, 7, 8, 9]
    assert packed.cu_seqlens.tolist() == [0, 3, 6]
    assert packed.parents.tolist() == [-1, 0, 0, -1, 3, 4]


def test_unshared_rows_are_chains():
    packed = pack(ROWS + ROWS[:1], share=False)
    assert packed.input_ids.tolist() == [t for row in ROWS + ROWS[:1] for t in row]
    assert packed.cu_seqlens.tolist() == [0, 5, 9, 14, 19]
    assert packed.report().estimated_speedup == 1.0


def test_short_prefixes_are_not_shared():
    rows = [[0, 1, 2, 3], [0, 1, 2, 4], [0, 5, 6], [0], [0], [0, 1, 2]]
    packed = pack(rows, min_shared=3)
    check(packed, Reference(rows, min_shared=3))
    # {0 1 2 3}, {0 1 2 4} and {0 1 2} share; the others begin alike, but too briefly.
    assert packed.cu_seqlens.tolist() == [0, 5, 8, 9, 10]


def test_answers_that_begin_alike_may_be_kept_apart():
    rows = [[1, 2, 8, 8], [1, 2, 8, 9], [1, 2, 8, 8]]
    assert pack(rows, max_shared=2).input_ids.tolist() == [1, 2, 8, 8, 8, 9, 8, 8]
    assert pack(rows).input_ids.tolist() == [1, 2, 8, 8, 9]
    assert pack(rows, max_shared=[2, 4, 4]).num_tokens == 7


def test_unpacking_is_the_inverse_of_packing():
    packed = pack(ROWS)
    assert [x.tolist() for x in packed.unpack(packed.input_ids)] == ROWS
    values = np.stack([packed.input_ids, packed.position_ids], 1)
    for row, got in zip(ROWS, packed.unpack(values)):
        assert got.tolist() == [[token, t] for t, token in enumerate(row)]
    padded = packed.unpack_padded(packed.input_ids, value=-1)
    assert padded.tolist() == [row + [-1] * (5 - len(row)) for row in ROWS]


def test_a_branch_point_has_a_label_per_child():
    labels = pack(ROWS).labels()
    assert labels.positions.tolist() == [0, 1, 2, 2, 3, 3]
    assert labels.ids.tolist() == [6, 7, 1, 3, 2, 4]
    assert labels.weights.tolist() == [3, 3, 2, 1, 1, 1]
    assert labels.tokens.tolist() == [1, 2, 3, 6, 4, 5]


def test_labels_without_weight_are_left_out_unless_asked_for():
    packed = pack(ROWS, prompt_lengths=3)
    assert packed.labels().positions.tolist() == [2, 2, 3, 3]
    assert packed.labels(keep_zeros=True).weights.tolist() == [0, 0, 2, 1, 1, 1]


def row_loss(rows, nll, row_weights, loss_mask, prompts, reduction):
    """The loss by its definition; nll(prefix, token)."""
    total, counted, sums = 0.0, 0.0, []
    for r, row in enumerate(rows):
        own, mass = 0.0, 0.0
        for t in range(1, len(row)):
            weight = loss_mask[r][t] if t >= prompts[r] else 0
            own += weight * nll(tuple(row[:t]), row[t])
            mass += weight
        counted += mass
        sums.append((row_weights[r] * own, mass))
    if reduction == "sum":
        return sum(own for own, _ in sums)
    if reduction == "token-mean":
        return sum(own for own, _ in sums) / (counted or 1)
    return sum(own / (mass or 1) for own, mass in sums) / max(len(rows), 1)


def packed_loss(packed, nll):
    prefixes = []
    for token, parent in zip(packed.input_ids.tolist(), packed.parents.tolist()):
        prefixes.append((prefixes[parent] if parent >= 0 else ()) + (token,))
    weighted = zip(prefixes, packed.loss_weights.tolist())
    return sum(weight * nll(prefix[:-1], prefix[-1]) for prefix, weight in weighted if weight)


def fake_nll(prefix, token):
    return random.Random(repr((prefix, token))).random()


@pytest.mark.parametrize("reduction", ["sum", "token-mean", "row-mean"])
def test_the_packed_loss_and_that_of_parts_equal_the_rows_loss(reduction):
    rng = random.Random(reduction)
    for _ in range(60):
        rows = random_rows(rng)
        loss_mask = [[rng.choice([0, 1, 1, 0.25]) for _ in row] for row in rows]
        row_weights = [rng.uniform(-2, 2) for _ in rows]
        prompts = [rng.randrange(5) for _ in rows]
        wanted = row_loss(rows, fake_nll, row_weights, loss_mask, prompts, reduction)
        packed = pack(
            rows, row_weights=row_weights, loss_mask=loss_mask, prompt_lengths=prompts,
            reduction=reduction, **random_options(rng, rows),
        )  # fmt: skip
        assert math.isclose(packed_loss(packed, fake_nll), wanted, rel_tol=1e-5, abs_tol=1e-5)
        longest = max(map(len, rows), default=1)
        parts = packed.partition(longest + rng.randrange(6))
        total = sum(packed_loss(part, fake_nll) for part in parts)
        assert math.isclose(total, wanted, rel_tol=1e-5, abs_tol=1e-5)


def test_masks_come_in_the_layout_of_the_rows():
    flat_mask = [9, 0, 1, 1, 0.5, 9, 1, 0, 1, 9, 1, 1, 0, 1]
    lengths = [5, 4, 5]
    nested = [flat_mask[:5], flat_mask[5:9], flat_mask[9:]]
    wanted = [0, 2, 2, 1, 0.5, 1, 1]
    padded, mask, padded_mask = (np.zeros((3, 5)) for _ in range(3))
    for r, row in enumerate(ROWS):
        padded[r, 5 - len(row) :], mask[r, 5 - len(row) :] = row, 1
        padded_mask[r, 5 - len(row) :] = nested[r]
    flat = [t for row in ROWS for t in row]
    assert pack(ROWS, loss_mask=nested).loss_weights.tolist() == wanted
    assert pack(ROWS, loss_mask=flat_mask).loss_weights.tolist() == wanted
    assert pack(flat, lengths, loss_mask=flat_mask).loss_weights.tolist() == wanted
    batch = pack(padded.astype(int), attention_mask=mask, loss_mask=padded_mask)
    assert batch.loss_weights.tolist() == wanted
    assert batch.with_weights(loss_mask=padded_mask > 0).loss_weights.tolist() == [
        0, 2, 2, 1, 1, 1, 1,
    ]  # fmt: skip


def test_other_weights_leave_the_batch_as_it_was():
    packed = pack(ROWS)
    other = packed.with_weights(row_weights=[1, 0, -2])
    assert packed.loss_weights.tolist() == [0, 3, 3, 2, 1, 1, 1]
    assert other.loss_weights.tolist() == [0, -1, -1, -1, 1, -2, 0]
    assert other.input_ids is packed.input_ids


def visited_tiles(packed, block_m, block_n):
    """Tiles with a visible pair, counted one by one."""
    seen, count = mask_of(packed), 0
    for a, b in zip(packed.cu_seqlens[:-1], packed.cu_seqlens[1:]):
        for m in range(a, b, block_m):
            for n in range(a, b, block_n):
                count += seen[m : min(m + block_m, b), n : min(n + block_n, b)].any()
    return count


@pytest.mark.parametrize("blocks", [(4, 4), (8, 4), (3, 5), (1, 1)])
def test_the_report_counts_the_tiles_that_hold_a_visible_pair(blocks):
    rng = random.Random(repr(blocks))
    for _ in range(40):
        rows = random_rows(rng)
        report = pack(rows).report(64, *blocks)
        assert report.tiles == visited_tiles(pack(rows), *blocks)
        assert report.row_tiles == visited_tiles(pack(rows, share=False), *blocks)
        assert report.row_tokens == sum(map(len, rows))
        assert report.tokens == pack(rows).num_tokens


def test_the_report_says_whether_sharing_pays():
    prompt = list(range(4096))
    long_prompt = pack([prompt + [5000 + r] * 128 for r in range(16)]).report()
    assert long_prompt.tokens == 4096 + 16 * 128
    assert long_prompt.row_tokens == 16 * (4096 + 128)
    assert long_prompt.pays and 10 < long_prompt.estimated_speedup < 11.5
    assert "sharing pays" in str(long_prompt)
    # One shared token, and tiles that straddle answers: more attention, no less of the rest.
    short_prompt = pack([[1] + [10 + r] * 255 for r in range(64)]).report(hidden_size=64)
    assert not short_prompt.pays
    assert "does not pay" in str(short_prompt)
    assert "nothing is shared" in str(pack([[1], [2]]).report())


def test_parts_hold_every_row_once_within_the_budget():
    rng = random.Random(5)
    for _ in range(150):
        rows = random_rows(rng)
        options = random_options(rng, rows)
        packed = pack(rows, **options)
        budget = max(map(len, rows), default=1) + rng.randrange(20)
        parts = packed.partition(budget)
        numbers = [row for part in parts for row in part.row_ids.tolist()]
        assert sorted(numbers) == list(range(len(rows)))
        for part in parts:
            assert part.num_tokens <= budget
            own = [rows[r] for r in part.row_ids]
            limits = options.get("max_shared")
            limits = limits and [limits[r] for r in part.row_ids]
            check(part, Reference(own, options.get("min_shared", 1), limits))


def test_trees_that_fit_stay_whole_and_share_parts():
    rows = [[1, 2, 3], [1, 2, 4], [5, 6], [7, 8, 9, 9]]  # trees of 4, 2 and 4 tokens
    parts = pack(rows).partition(6)
    assert [part.row_ids.tolist() for part in parts] == [[0, 1, 2], [3]]
    assert [part.num_tokens for part in parts] == [6, 4]


def test_a_large_tree_is_split_between_rows_and_its_ancestors_are_repeated():
    prompt = [1] * 10
    rows = [prompt + [r] * 4 for r in range(2, 8)]
    parts = pack(rows).partition(18)
    assert [part.row_ids.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert [part.num_tokens for part in parts] == [18, 18, 18]
    with pytest.raises(InvalidArgument, match="tree of row 0 has 34 tokens.*18"):
        pack(rows).partition(18, split=False)


def test_parts_of_parts_still_name_the_rows_of_the_batch():
    rows = [[r, r] for r in range(8)]
    inner = pack(rows).partition(8)[1].partition(4)
    assert [part.row_ids.tolist() for part in inner] == [[4, 5], [6, 7]]


def test_select_packs_rows_in_the_order_given():
    packed = pack(ROWS, row_weights=[1, 2, 4]).select([2, 0])
    assert [x.tolist() for x in packed.unpack(packed.input_ids)] == [ROWS[2], ROWS[0]]
    assert packed.row_ids.tolist() == [2, 0]
    assert packed.loss_weights.tolist() == [0, 5, 5, 5, 4, 1]
    with pytest.raises(InvalidArgument, match=r"rows\[1\] is 3, expected.*0 to 2"):
        pack(ROWS).select([0, 3])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([[1, 2], [3, 4.5]],), {}, r"rows\[1\]\[1\] is 4.5, expected an integer"),
        (([[1.0] * 40, [2] * 40],), {}, r"rows\[0\]\[0\] is 1.0"),
        (([[1], [2**63]],), {}, r"rows\[1\]\[0\] is 9223372036854775808"),
        (([1, 2, 3],), {}, r"rows\[0\] is 1, expected a row.*lengths"),
        (([np.zeros(2)],), {}, "elements of float64, expected integers"),
        (([np.zeros((1, 2), int)],), {}, r"rows\[0\] is \[1, 2\]"),
        ((np.zeros(3, int),), {}, "or one dimension with lengths"),
        (([1, 2, 3], [2, 2]), {}, "lengths sum to 4, expected 3"),
        (([1, 2, 3], [4, -1]), {}, r"lengths\[1\] is -1"),
        (([1], [1]), {"attention_mask": [[1]]}, "expected one of them"),
        ((ROWS,), {"attention_mask": [[1]]}, r"expected rows as \[rows, longest\]"),
        ((np.zeros((2, 2), int),), {"attention_mask": [[1]]}, r"attention_mask is \[1, 1\]"),
        ((ROWS,), {"min_shared": 0}, "min_shared is 0, expected at least 1"),
        ((ROWS,), {"max_shared": [1, -1, 0]}, r"max_shared\[1\] is -1"),
        ((ROWS,), {"max_shared": [1, 2]}, r"max_shared is \[2\], expected one value per row"),
        ((ROWS,), {"row_weights": [1, 2]}, "row_weights is"),
        ((ROWS,), {"row_weights": [1, math.nan, 1]}, "row_weights has a value that is not finite"),
        ((ROWS,), {"loss_mask": [[1] * 5, [1] * 3, [1] * 5]}, r"loss_mask\[1\] has 3 elements.* 4"),
        ((ROWS,), {"loss_mask": [[1] * 5]}, "loss_mask has 1 rows, expected 3"),
        ((ROWS,), {"loss_mask": np.ones(3)}, r"loss_mask is \[3\].*\[14\]"),
        ((ROWS,), {"prompt_lengths": 0.5}, "prompt_lengths is of float64, expected integers"),
        ((ROWS,), {"reduction": "mean"}, "reduction is 'mean', expected one of"),
    ],
)  # fmt: skip
def test_bad_input_is_named(arguments, options, message):
    with pytest.raises(InvalidArgument, match=message):
        pack(*arguments, **options)


def test_a_row_longer_than_the_budget_is_named():
    with pytest.raises(InvalidArgument, match="row 1 has 3 tokens.* max_tokens = 2"):
        pack([[1], [1, 2, 3]]).partition(2)
    with pytest.raises(InvalidArgument, match=r"x is \[6\], expected \[7, ...\]"):
        pack(ROWS).unpack(np.zeros(6))


def test_batches_survive_pickling():
    packed = pickle.loads(pickle.dumps(pack(ROWS, row_weights=[1, 2, 3])))
    check(packed, Reference(ROWS))
    assert packed.loss_weights.tolist() == [0, 6, 6, 4, 1, 3, 2]
    assert [part.row_ids.tolist() for part in packed.partition(6)] == [[0, 2], [1]]


def test_the_plan_needs_no_torch(monkeypatch):
    import importlib.util

    import treeattn

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    packed = pack(ROWS)
    # q = 0: exp(lse) counts the keys that a token sees, which are those above it and itself.
    q = np.zeros((7, 1, 4), np.float32)
    _, lse = treeattn.tree_attention(q, q, q, packed.plan, return_lse=True)
    assert type(packed.plan).__module__ == "treeattn._numpy"
    np.testing.assert_allclose(np.exp(lse[0]), packed.position_ids + 1, rtol=1e-6)


# With torch.


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def test_tensors_in_and_out(torch):
    rows = [torch.tensor(row, dtype=torch.int32) for row in ROWS]
    packed = pack([*rows, torch.empty(0)], device="cpu")
    check(pack([*rows, torch.empty(0)]), Reference([*ROWS, []]))
    assert packed.input_ids.dtype == packed.position_ids.dtype == torch.int64
    assert packed.tree_dfs_order_start_q.dtype == packed.cu_seqlens.dtype == torch.int32
    assert packed.loss_weights.dtype == torch.float32
    assert [x.tolist() for x in packed.unpack(packed.input_ids)] == [*ROWS, []]
    assert packed.device == torch.device("cpu")
    assert isinstance(packed.to(None).input_ids, np.ndarray)
    assert all(part.device == packed.device for part in packed.partition(6))


def test_log_probs_and_loss_are_those_of_the_rows(torch):
    torch.manual_seed(0)
    rows = ROWS + [[5, 6], [8, 1, 1], [8], []]
    packed = pack(rows, row_weights=[1, -2, 3, 1, 1, 1, 1], prompt_lengths=2, device="cpu")
    logits = torch.randn(packed.num_tokens, 9, dtype=torch.float64, requires_grad=True)
    loss = packed.loss(logits)
    by_row, expected = packed.unpack(packed.token_log_probs(logits)), 0
    for row, scale, own, got in zip(rows, [1, -2, 3, 1, 1, 1, 1], packed.unpack(logits), by_row):
        wanted = own.log_softmax(-1)[torch.arange(len(row) - 1), row[1:]] if row else own[:, 0]
        torch.testing.assert_close(got[1:], wanted)
        assert not row or got[0] == 0
        expected = expected - scale * wanted[1:].sum()
    torch.testing.assert_close(loss, expected)
    (got,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(packed.loss(logits[None]), loss)


def test_log_probs_do_not_depend_on_how_logits_are_cut(torch, monkeypatch):
    from treeattn import _log_probs

    rows = [[1, 2, 3, n % 7] for n in range(9)] + [[n] for n in range(5)]
    packed = pack(rows, device="cpu")
    logits = torch.randn(packed.num_tokens, 8, dtype=torch.float64, requires_grad=True)

    def run():
        log_probs = packed.token_log_probs(logits)
        weights = torch.linspace(-1, 2, packed.num_tokens, dtype=torch.float64)
        return log_probs, torch.autograd.grad((log_probs * weights).sum(), logits)[0]

    whole = run()
    for elements in (1, 8, 24, 40):
        monkeypatch.setattr(_log_probs, "_CHUNK", elements)
        for got, wanted in zip(run(), whole):
            torch.testing.assert_close(got, wanted)
    assert torch.autograd.gradcheck(packed.token_log_probs, (logits,))


def test_gradients_of_likely_labels_are_not_lost_in_bfloat16(torch):
    packed = pack([[0, 1]], device="cpu")
    logits = torch.tensor([[0.0, 6.0], [0.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    packed.loss(logits).backward()
    wanted = 1 / (1 + math.exp(6))
    assert math.isclose(logits.grad[0, 0].item(), wanted, rel_tol=5e-3)
    assert math.isclose(logits.grad[0, 1].item(), -wanted, rel_tol=5e-3)
    assert logits.grad[1].tolist() == [0, 0]


def test_unpacking_is_differentiable(torch):
    packed = pack(ROWS, device="cpu")
    x = torch.zeros(7, 2, requires_grad=True)
    (packed.unpack_padded(x, value=5.0) * torch.tensor([1.0, 2.0])).sum().backward()
    assert x.grad[:, 0].tolist() == [3, 3, 3, 2, 1, 1, 1]
    x.grad = None
    sum(row.sum() for row in packed.unpack(x)).backward()
    assert x.grad[:, 1].tolist() == [3, 3, 3, 2, 1, 1, 1]


def test_bad_logits_are_named(torch):
    packed = pack(ROWS, device="cpu")
    with pytest.raises(InvalidArgument, match=r"logits is \[6, 9\], expected \[7, vocabulary\]"):
        packed.token_log_probs(torch.zeros(6, 9))
    with pytest.raises(InvalidArgument, match="token 2 has id 7, expected one from 0 to 6"):
        packed.loss(torch.zeros(7, 7))
    with pytest.raises(InvalidArgument, match="in numpy arrays, expected cpu as logits"):
        pack(ROWS).loss(torch.zeros(7, 9))


def test_the_plan_computes_each_row_as_if_alone(torch):
    import treeattn

    torch.manual_seed(0)
    rows = ROWS + [[5, 9], [8, 8, 8]]
    packed = pack(rows, device="cpu")
    q, k, v = (torch.randn(packed.num_tokens, 2, 8, dtype=torch.float64) for _ in range(3))
    together = treeattn.tree_attention(q, k, v, packed.plan)
    alone = pack(rows, share=False, device="cpu")
    index = packed.row_positions
    apart = treeattn.tree_attention(q[index], k[index], v[index], alone.plan)
    torch.testing.assert_close(together[index], apart)
    assert packed.plan is packed.plan


def test_whole_parts_and_unshared_rows_give_a_model_the_same_gradients(torch):
    import treeattn

    torch.manual_seed(0)
    rng = random.Random(0)
    prompts = [[rng.randrange(12) for _ in range(9)] for _ in range(3)]
    rows = [prompts[r % 3] + [rng.randrange(12) for _ in range(2 + r % 5)] for r in range(14)]
    rows += [prompts[0], rows[3], rows[4][:-1]]
    embedding = torch.randn(12, 8, dtype=torch.float64, requires_grad=True)
    places = torch.randn(16, 8, dtype=torch.float64)
    mixing = torch.randn(3, 8, 8, dtype=torch.float64, requires_grad=True)
    options = dict(
        row_weights=[rng.uniform(-1, 1) for _ in rows], prompt_lengths=8, reduction="row-mean"
    )

    def run(batches):
        loss = 0.0
        for batch in batches:
            x = embedding[batch.input_ids] + places[batch.position_ids]
            q, k, v = ((x @ w).view(-1, 2, 4) for w in mixing)
            x = x + treeattn.tree_attention(q, k, v, batch.plan).flatten(1)
            loss = loss + batch.loss(x @ embedding.T)
        return loss, *torch.autograd.grad(loss, (embedding, mixing))

    whole = pack(rows, device="cpu", **options)
    parts = whole.partition(20)
    assert len(parts) > 3 and sum(part.num_tokens for part in parts) > whole.num_tokens
    unshared = pack(rows, share=False, device="cpu", **options)
    wanted = run([unshared])
    for batches in ([whole], parts, unshared.partition(40)):
        for got, expected in zip(run(batches), wanted):
            # Loss weights are float32.
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
