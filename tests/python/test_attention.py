"""Native API on the CPU executor: values, gradients, compile, autocast, bad input."""

import math
import os

import pytest

torch = pytest.importorskip("torch")
if not os.environ.get("TREEATTN_LIBRARY"):
    pytest.skip("TREEATTN_LIBRARY names no library", allow_module_level=True)

import treeattn  # noqa: E402

START = [0, 0, 1, 1, 2, 2, 3]
END = [3, 3, 1, 1, 2, 2, 3]
TOKENS = len(START)


def make_plan():
    return treeattn.plan([0, TOKENS], tree_dfs_order_start_q=START, tree_dfs_order_end_k=END)


def make_qkv(heads=4, heads_kv=2, dim=8, dtype=torch.float64, grad=True):
    torch.manual_seed(0)
    q = torch.randn(TOKENS, heads, dim, dtype=dtype, requires_grad=grad)
    k, v = (torch.randn(TOKENS, heads_kv, dim, dtype=dtype, requires_grad=grad) for _ in range(2))
    return q, k, v


def reference(q, k, v, scale=None):
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or 1 / math.sqrt(q.shape[2]))
    start, end = torch.tensor(START), torch.tensor(END)
    at = torch.arange(TOKENS)
    seen = (at[None] <= at[:, None]) & (start[:, None] <= end[None])
    scores = scores.masked_fill(~seen, -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)


def gradients(run, seed=1):
    q, k, v = make_qkv()
    out, lse = run(q, k, v)
    torch.manual_seed(seed)
    weights = torch.randn(out.shape, dtype=out.dtype), torch.randn(lse.shape, dtype=out.dtype)
    loss = (out * weights[0]).sum() + (lse * weights[1]).sum()
    return out, lse, torch.autograd.grad(loss, (q, k, v))


def native(q, k, v):
    return treeattn.tree_attention(q, k, v, make_plan(), return_lse=True)


def test_values_and_gradients_agree_with_dense_attention():
    out, lse, grads = gradients(native)
    expected, expected_lse, expected_grads = gradients(reference)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
    for got, wanted in zip(grads, expected_grads):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_the_gradient_of_a_sum_whose_tokens_share_memory():
    weights = torch.arange(1.0, 33.0, dtype=torch.float64).reshape(4, 8)
    q, k, v = make_qkv()
    strides = []

    def loss(out):
        out.register_hook(lambda dout: strides.append(dout.stride()))
        return (out.sum(0) * weights).sum()

    grads = torch.autograd.grad(loss(native(q, k, v)[0]), (q, k, v))
    expected = torch.autograd.grad(loss(reference(q, k, v)[0]), (q, k, v))
    assert strides[0][0] == 0
    for got, wanted in zip(grads, expected):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    spread = treeattn._engine._spread(torch.zeros(1, 4, 8).expand(5, 4, 8))
    assert spread.stride() == (32, 8, 1)


def test_a_compiled_function_has_no_graph_break_and_the_same_gradients():
    plan = make_plan().prepare(4, 2, 8, dtype=torch.float64)
    compiled = torch.compile(
        lambda q, k, v: treeattn.tree_attention(q, k, v, plan, return_lse=True),
        backend="aot_eager",
        fullgraph=True,
    )
    for got, wanted in zip(gradients(compiled)[2], gradients(native)[2]):
        torch.testing.assert_close(got, wanted)


def test_a_compiled_function_serves_batches_of_other_lengths():
    compiles = []

    def count(graph, inputs):
        compiles.append(graph)
        return graph.forward

    @torch.compile(backend=count, fullgraph=True)
    def layer(q, k, v, plan):
        return treeattn.tree_attention(q * 1.0, k, v, plan)

    for ready in (False, True):
        compiles.clear()
        for more in range(1, 6):
            start, end = [*START, *[3] * more], [*END, *[3] * more]
            n = len(start)
            plan = treeattn.plan([0, n], tree_dfs_order_start_q=start, tree_dfs_order_end_k=end)
            if ready:
                plan.prepare(4, 2, 8, dtype=torch.float64)
            q, k, v = (torch.randn(n, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
            got = layer(q, k, v, plan)
            torch.testing.assert_close(got, treeattn.tree_attention(q, k, v, plan))
        assert len(compiles) <= 2, f"{len(compiles)} compiles"


def test_autocast_decides_the_dtype():
    q, k, v = make_qkv(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = treeattn.tree_attention(q, k, v, make_plan())
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


def test_tile_lists_are_built_once_for_all_layers():
    plan = make_plan()
    q, k, v = make_qkv()
    treeattn.tree_attention(q, k, v, plan)
    first = [lists.pointer for lists in plan._built.values()]
    with torch.no_grad():
        treeattn.tree_attention(q, k, v, plan)
    assert [lists.pointer for lists in plan._built.values()] == first


def test_tile_lists_built_in_inference_mode_serve_training():
    plan = make_plan()
    with torch.inference_mode():
        plan.prepare(4, 2, 8, dtype=torch.float64)
        treeattn.tree_attention(*(x.detach() for x in make_qkv()), plan)
    assert not next(iter(plan._built.values())).buffer.is_inference()
    q, k, v = make_qkv()
    layer = torch.compile(treeattn.tree_attention, backend="aot_eager", fullgraph=True)
    for run in (treeattn.tree_attention, layer):
        (dq,) = torch.autograd.grad(run(q, k, v, plan).sum(), q)
        torch.testing.assert_close(dq, torch.autograd.grad(reference(q, k, v)[0].sum(), q)[0])


def test_second_derivatives_are_refused():
    q, k, v = make_qkv()
    out = treeattn.tree_attention(q, k, v, make_plan())
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        dq.sum().backward()


def test_an_invalid_tree_is_named():
    plan = treeattn.plan([0, 3], tree_dfs_order_start_q=[0, 2, 1], tree_dfs_order_end_k=[2, 2, 1])
    with pytest.raises(treeattn.InvalidArgument, match="2"):
        plan.validate()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(tree_dfs_order_start_q=START), "tree_dfs_order_end_k is missing"),
        (dict(first=START), "length is missing"),
        (dict(tree_dfs_order_start_q=START, tree_dfs_order_end_k=END, causal=False), "causal"),
        (dict(tree_dfs_order_start_q=START, tree_dfs_order_end_k=END, total_q=9), "total_q is 9"),
    ],
)
def test_bad_plans_are_refused(change, text):
    with pytest.raises(treeattn.InvalidArgument, match=text):
        treeattn.plan([0, TOKENS], **change)


def test_bad_tensors_are_refused():
    q, k, v = make_qkv()
    with pytest.raises(treeattn.InvalidArgument, match="k is .* expected"):
        treeattn.tree_attention(q, k[:3], v, make_plan())
    with pytest.raises(treeattn.InvalidArgument, match="v is torch.float32"):
        treeattn.tree_attention(q, k, v.float(), make_plan())
    with pytest.raises(treeattn.InvalidArgument, match="softmax_scale"):
        treeattn.tree_attention(q, k, v, make_plan(), softmax_scale=-1.0)
