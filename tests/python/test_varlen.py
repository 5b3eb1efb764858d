"""The varlen function with tree arrays on the CPU executor: values, refusals, shared plans."""

import gc
import math
import os
import weakref

import pytest

torch = pytest.importorskip("torch")
if not os.environ.get("TREEATTN_LIBRARY"):
    pytest.skip("TREEATTN_LIBRARY names no library", allow_module_level=True)

import treeattn  # noqa: E402
from treeattn import varlen  # noqa: E402

TOKENS = 7


@pytest.fixture(autouse=True)
def no_shared_plans():
    treeattn.forget_plans()
    yield
    treeattn.forget_plans()


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def arrays():
    """A prompt of 3 tokens with answers of 2 and 2 below it: end_k, start_q."""
    return ints(2, 2, 2, 1, 1, 2, 2), ints(0, 0, 0, 1, 1, 2, 2)


def qkv(heads=4, heads_kv=2, dim=16, dim_v=None, tokens=TOKENS, dtype=torch.float64):
    torch.manual_seed(0)
    q = torch.randn(tokens, heads, dim, dtype=dtype, requires_grad=True)
    k = torch.randn(tokens, heads_kv, dim, dtype=dtype, requires_grad=True)
    v = torch.randn(tokens, heads_kv, dim_v or dim, dtype=dtype, requires_grad=True)
    return q, k, v


def dense(q, k, v, seen, scale=None, softcap=0.0):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[2] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)


def tree_mask(end_k, start_q):
    at = torch.arange(len(start_q))
    return (at[None] <= at[:, None]) & (start_q[:, None] <= end_k[None])


def call(q, k, v, end_k=None, start_q=None, cu=None, **options):
    cu = ints(0, q.shape[0]) if cu is None else cu
    options.setdefault("causal", True)
    n = q.shape[0]
    return treeattn.flash_attn_varlen_func(
        q, k, v, cu, cu, n, n,
        tree_dfs_order_end_k=end_k, tree_dfs_order_start_q=start_q, **options,
    )  # fmt: skip


def plans():
    return len(varlen._plans)


def test_a_tree_agrees_with_dense_attention_and_so_do_its_gradients():
    end_k, start_q = arrays()
    q, k, v = qkv(dim_v=8)
    out, lse, third = call(
        q, k, v, end_k, start_q, return_attn_probs=True, softmax_scale=0.3, softcap=2.0
    )
    expected, expected_lse = dense(q, k, v, tree_mask(end_k, start_q), 0.3, 2.0)
    assert third is None
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(out)
    got = torch.autograd.grad((out * weights).sum() + lse.sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weights).sum() + expected_lse.sum(), (q, k, v))
    for one, other in zip(got, wanted):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_without_arrays_causal_says_what_is_seen():
    q, k, v = qkv()
    every = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    torch.testing.assert_close(call(q, k, v, causal=False), dense(q, k, v, every)[0])
    torch.testing.assert_close(call(q, k, v), dense(q, k, v, every.tril())[0])
    # FlashAttention's other way to say causal.
    torch.testing.assert_close(call(q, k, v, causal=False, window_size=(-1, 0)), call(q, k, v))


def test_sequences_are_apart_and_causal_is_aligned_to_the_bottom_right():
    q, k, v = qkv()
    out = treeattn.flash_attn_varlen_func(
        q[:3], k, v, ints(0, 1, 3), ints(0, 4, 7), 2, 4, causal=True
    )
    seen = torch.zeros(3, TOKENS, dtype=torch.bool)
    seen[0, :4], seen[1, 4:6], seen[2, 4:] = True, True, True
    torch.testing.assert_close(out, dense(q[:3], k, v, seen)[0])


def test_positional_arguments_are_in_the_order_of_the_fork():
    end_k, start_q = arrays()
    q, k, v = qkv()
    cu = ints(0, TOKENS)
    out = treeattn.flash_attn_varlen_func(
        q, k, v, cu, cu, TOKENS, TOKENS, 0.0, None, True, (-1, -1), 0.0, None, False, False, None,
        end_k, start_q,
    )  # fmt: skip
    torch.testing.assert_close(out, dense(q, k, v, tree_mask(end_k, start_q))[0])


def test_the_names_of_the_forks_inner_layer():
    end_k, start_q = arrays()
    q, k, v = qkv()
    cu = ints(0, TOKENS)
    out = treeattn.flash_attn_varlen_func(
        q, k, v, cu, cu, TOKENS, TOKENS, causal=True,
        tree_end_position_id_k=end_k, tree_start_position_id_q=start_q,
    )  # fmt: skip
    assert torch.equal(out, call(q, k, v, end_k, start_q))
    with pytest.raises(treeattn.InvalidArgument, match="two names of one array"):
        call(q, k, v, end_k, start_q, tree_end_position_id_k=end_k)


NOT_COMPUTED = [
    (dict(window_size=(3, 0)), "window_size"),
    (dict(window_size=(-1, 2), causal=False), "window_size"),
    (dict(alibi_slopes=torch.ones(4)), "alibi_slopes"),
    (dict(dropout_p=0.1), "dropout_p"),
    (dict(block_table=torch.zeros(1, 1, dtype=torch.int32)), "block_table"),
    (dict(s_aux=torch.zeros(4)), "attention sinks"),
    (dict(learnable_sink=torch.zeros(4)), "attention sinks"),
]


@pytest.mark.parametrize(("option", "name"), NOT_COMPUTED)
def test_what_is_not_computed_is_refused_by_name(option, name):
    for tree in ((), arrays()):
        if tree and not option.get("causal", True):
            continue  # a tree is causal
        with pytest.raises(treeattn.Unsupported, match=name):
            call(*qkv(), *tree, **option)


def test_a_window_that_reaches_every_key_is_none():
    q, k, v = qkv()
    assert torch.equal(call(q, k, v, *arrays(), window_size=(TOKENS, 0)), call(q, k, v, *arrays()))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(causal=False), "causal is False with tree arrays"),
        (dict(start_q=None), "tree_dfs_order_start_q is missing"),
        (dict(end_k=None), "tree_dfs_order_end_k is missing"),
        (dict(start_q=ints(0, 0, 0)), "tree_dfs_order_start_q has 3 elements, expected 7"),
        (dict(end_k=arrays()[0][None]), r"tree_dfs_order_end_k is \[1, 7\]"),
        (dict(end_k=arrays()[0].float()), "tree_dfs_order_end_k is torch.float32"),
        (dict(cu=[0, 7]), "cu_seqlens_q is list"),
    ],
)
def test_bad_arguments_are_refused(change, text):
    end_k, start_q = arrays()
    with pytest.raises(treeattn.InvalidArgument, match=text):
        call(*qkv(), **{**dict(end_k=end_k, start_q=start_q), **change})


def test_an_invalid_tree_is_nan_or_an_error(monkeypatch):
    end_k, start_q = ints(2, 2, 1), ints(0, 2, 1)
    q, k, v = qkv(tokens=3)
    assert call(q, k, v, end_k, start_q).isnan().all()
    treeattn.forget_plans()
    monkeypatch.setenv("TREEATTN_VALIDATE", "1")
    with pytest.raises(treeattn.InvalidArgument, match="start_q"):
        call(q, k, v, end_k, start_q)


def test_layers_share_one_plan():
    end_k, start_q = arrays()
    cu = ints(0, TOKENS)
    q, k, v = qkv()
    for _ in range(3):
        call(q, k, v, end_k, start_q, cu)
    (shared,) = varlen._plans.values()
    assert len(shared.plan._built) == 1
    # Another head size in the model adds its tile lists to the same plan.
    call(*qkv(dim=32), end_k, start_q, cu)
    assert plans() == 1 and len(shared.plan._built) == 2


def test_views_made_for_each_layer_share_one_plan():
    end_k, start_q = (x[None] for x in arrays())
    cu = ints(0, TOKENS)
    q, k, v = qkv()
    for _ in range(3):
        call(q, k, v, end_k.view(-1), start_q[0], cu)
        gc.collect()
    assert plans() == 1
    call(q, k, v, end_k.view(-1), start_q[0], cu[[0, 1]])
    assert plans() == 1, "the plan of the boundaries that are gone was not dropped"


@pytest.mark.parametrize("which", ["end_k", "start_q", "cu"])
def test_an_array_changed_in_place_is_lowered_again(which):
    end_k, start_q = arrays()
    cu = ints(0, TOKENS, TOKENS)
    q, k, v = qkv()
    before = call(q, k, v, end_k, start_q, cu)
    seen = tree_mask(end_k, start_q)
    if which == "end_k":
        end_k[3:5] = 2  # the second answer now sees the first
    elif which == "start_q":
        start_q[5:] = 1
        end_k[3:5] = 1
    else:
        cu[1] = 3
        seen[3:, :3] = False
    if which != "cu":
        seen = tree_mask(end_k, start_q)
    after = call(q, k, v, end_k, start_q, cu)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, dense(q, k, v, seen)[0])


def test_freed_arrays_take_their_plan_along_and_new_ones_in_their_place_are_lowered():
    q, k, v = qkv()
    cu = ints(0, TOKENS)
    for turn in range(20):
        # Equal sizes: the allocator hands out the same memory, and Python the same ids.
        end_k, start_q = arrays()
        if turn % 2:
            end_k = torch.full_like(end_k, 2)
        expected = dense(q, k, v, tree_mask(end_k, start_q))[0]
        torch.testing.assert_close(call(q, k, v, end_k, start_q, cu), expected)
        assert plans() == 1
        plan = weakref.ref(next(iter(varlen._plans.values())).plan)
        del end_k, start_q
        assert plans() == 0 and plan() is None


def test_memory_exchanged_under_a_tensor_is_noticed():
    end_k, start_q = arrays()
    cu = ints(0, TOKENS)
    q, k, v = qkv()
    call(q, k, v, end_k, start_q, cu)
    end_k.data = torch.full_like(end_k, 2)
    out = call(q, k, v, end_k, start_q, cu)
    torch.testing.assert_close(out, dense(q, k, v, tree_mask(end_k, start_q))[0])


def test_inference_tensors_are_lowered_each_time():
    with torch.inference_mode():
        end_k, start_q = arrays()
        cu = ints(0, TOKENS)
        q, k, v = (x.detach() for x in qkv())
        call(q, k, v, end_k, start_q, cu)
        end_k.fill_(2)
        out = call(q, k, v, end_k, start_q, cu)
        torch.testing.assert_close(out, dense(q, k, v, tree_mask(end_k, start_q))[0])
    assert plans() == 0


def test_only_so_many_plans_are_kept():
    q, k, v = qkv()
    kept = [arrays() for _ in range(40)]
    for end_k, start_q in kept:
        call(q, k, v, end_k, start_q)
    assert plans() <= varlen._MAX_PLANS and len(varlen._checked) <= varlen._MAX_PLANS


def test_an_edit_between_forward_and_backward_does_not_change_the_gradients():
    end_k, start_q = arrays()
    q, k, v = qkv()
    expected = torch.autograd.grad(call(q, k, v, end_k, start_q).sum(), (q, k, v))
    out = call(q, k, v, end_k, start_q)
    end_k.fill_(2)
    for one, other in zip(torch.autograd.grad(out.sum(), (q, k, v)), expected):
        assert torch.equal(one, other)


def test_a_compiled_layer_has_no_graph_break_and_shares_the_plan():
    end_k, start_q = arrays()
    cu = ints(0, TOKENS)

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def layer(q, k, v, cu, end_k, start_q):
        return call(q * 1.0, k, v, end_k, start_q, cu)

    q, k, v = qkv()
    expected = dense(q, k, v, tree_mask(end_k, start_q))[0]
    for _ in range(2):
        out = layer(q, k, v, cu, end_k, start_q)
        torch.testing.assert_close(out, expected)
    assert plans() == 1
    got = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert plans() == 1
    for one, other in zip(got, torch.autograd.grad(expected.square().sum(), (q, k, v))):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    end_k[3:5] = 2
    out = layer(q, k, v, cu, end_k, start_q)
    torch.testing.assert_close(out, dense(q, k, v, tree_mask(end_k, start_q))[0])


def test_gradients_by_torch_func_and_operators_for_dispatch_modes():
    from torch.utils.flop_counter import FlopCounterMode
    from torch.utils._python_dispatch import TorchDispatchMode

    end_k, start_q = arrays()
    q, k, v = (x.detach() for x in qkv())
    expected = torch.func.grad(
        lambda q: dense(q, k, v, tree_mask(end_k, start_q))[0].square().sum()
    )(q)
    got = torch.func.grad(lambda q: call(q, k, v, end_k, start_q).square().sum())(q)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)

    class Record(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            self.seen.append(str(operator))
            return operator(*args, **(kwargs or {}))

    with Record() as record, FlopCounterMode(display=False):
        call(q, k, v, end_k, start_q)
    assert "treeattn.varlen_forward.default" in record.seen
