"""patch_FA_tree_attn: transformers' FlashAttention layers take tree arrays, without flash_attn."""

import importlib.util
import os

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
if not os.environ.get("TREEATTN_LIBRARY"):
    pytest.skip("TREEATTN_LIBRARY names no library", allow_module_level=True)
if importlib.util.find_spec("flash_attn") is not None:
    pytest.skip("flash_attn is installed and would take over", allow_module_level=True)

import treeattn  # noqa: E402
from treeattn import patch_fa_tree_attn  # noqa: E402
from treeattn.patch_fa_tree_attn import patch_FA_tree_attn  # noqa: E402

PROMPT, ANSWERS = 5, (3, 4)
TOKENS = PROMPT + sum(ANSWERS)


@pytest.fixture(autouse=True)
def patched(monkeypatch):
    """Patches, and takes everything back afterwards."""
    from transformers import PreTrainedModel, modeling_flash_attention_utils
    from transformers.integrations import flash_attention

    original = modeling_flash_attention_utils._flash_attention_forward
    places = [modeling_flash_attention_utils, flash_attention]
    before = {name: PreTrainedModel.__dict__.get(name) for name in METHODS}
    patch_FA_tree_attn()
    yield
    for place in places:
        place._flash_attention_forward = original
    for name, method in before.items():
        if method is None:
            delattr(PreTrainedModel, name)
        else:
            setattr(PreTrainedModel, name, method)


METHODS = ("_check_and_adjust_attn_implementation", "__call__")


def make(implementation="flash_attention_2", kind="Llama", **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
        use_cache=False, **changes,
    )  # fmt: skip
    config._attn_implementation = implementation
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def tree():
    """A packed prompt with two answers: model arguments, and the rows it stands for."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (1, TOKENS), generator=generator)
    start = [0] * PROMPT + [1] * ANSWERS[0] + [2] * ANSWERS[1]
    end = [2] * PROMPT + [1] * ANSWERS[0] + [2] * ANSWERS[1]
    depth = [*range(PROMPT), *range(PROMPT, PROMPT + ANSWERS[0]), *range(PROMPT, PROMPT + ANSWERS[1])]
    cu = torch.tensor([0, TOKENS], dtype=torch.int32)
    arguments = dict(
        input_ids=ids, position_ids=torch.tensor([depth]),
        cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=TOKENS, max_length_k=TOKENS,
        tree_dfs_order_end_k=torch.tensor(end, dtype=torch.int32),
        tree_dfs_order_start_q=torch.tensor(start, dtype=torch.int32),
    )  # fmt: skip
    first = [*range(PROMPT + ANSWERS[0])]
    second = [*range(PROMPT), *range(PROMPT + ANSWERS[0], TOKENS)]
    return arguments, (first, second)


def test_a_packed_tree_gives_the_logits_and_gradients_of_its_rows():
    arguments, rows = tree()
    model, plain = make(), make("eager")
    logits = model(**arguments).logits[0]
    loss = 0
    for row in rows:
        expected = plain(arguments["input_ids"][:, row]).logits[0]
        torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)
        answer = row[PROMPT:]
        loss = loss + logits[answer].square().sum()
    loss.backward()
    for row in rows:
        plain(arguments["input_ids"][:, row]).logits[0][PROMPT:].square().sum().backward()
    for (name, one), other in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-3, rtol=1e-3, msg=name)


def test_arrays_of_a_batch_and_without_boundaries():
    arguments, rows = tree()
    model = make()
    expected = model(**arguments).logits
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
        del arguments[name]
    for name in ("tree_dfs_order_end_k", "tree_dfs_order_start_q"):
        arguments[name] = arguments[name].expand(2, -1)
    for name in ("input_ids", "position_ids"):
        arguments[name] = arguments[name].expand(2, -1)
    both = model(**arguments).logits
    for one in both:
        torch.testing.assert_close(one, expected[0])


def test_from_pretrained_takes_flash_attention_2_without_flash_attn(tmp_path):
    model = make("eager")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="flash_attention_2", dtype=torch.float32
    )
    assert loaded.config._attn_implementation == "flash_attention_2"
    arguments, rows = tree()
    torch.testing.assert_close(loaded(**arguments).logits, make()(**arguments).logits)


def test_calls_without_arrays_are_ordinary_attention():
    model, plain = make(), make("eager")
    ids = torch.randint(0, 64, (3, 9))
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    got, wanted = (m(ids, attention_mask=mask).logits for m in (model, plain))
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=1e-4)


def test_greedy_generation_with_padding():
    model, plain = make(), make("eager")
    ids = torch.randint(1, 64, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = dict(
        attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0
    )
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


def test_full_attention_with_and_without_padding():
    from transformers import modeling_flash_attention_utils as utils

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 6, heads, 16) for heads in (4, 2, 2))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    for given in (None, mask):
        out = utils._flash_attention_forward(q, k, v, given, 6, False)
        seen = torch.ones(2, 1, 1, 6, dtype=torch.bool) if given is None else given.bool()[:, None, None]
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen, enable_gqa=True
        )
        torch.testing.assert_close(out, expected.transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_keeps_the_arrays():
    arguments, rows = tree()
    gradients = []
    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**arguments).logits.square().sum().backward()
        gradients.append([x.grad for x in model.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


def test_compiled_layers():
    arguments, rows = tree()
    model = make()
    expected = model(**arguments).logits
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(model(**arguments).logits, expected)


def test_a_model_that_loses_the_arrays_says_so():
    arguments, rows = tree()
    model = make()
    for layer in model.model.layers[1:]:
        forward = layer.self_attn.forward

        def without(*args, forward=forward, **kwargs):
            for name in ("tree_dfs_order_end_k", "tree_dfs_order_start_q"):
                kwargs.pop(name)
            return forward(*args, **kwargs)

        layer.self_attn.forward = without
    with pytest.raises(treeattn.TreeAttnError, match="ran without the tree arrays"):
        model(**arguments)
    with pytest.raises(treeattn.InvalidArgument, match="'sdpa', which would leave them out"):
        make("sdpa")(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (dict(tree_dfs_order_end_k=None), treeattn.InvalidArgument, "end_k is missing"),
        (dict(cu_seq_lens_k=None), treeattn.InvalidArgument, "cu_seq_lens_k is missing"),
        (
            dict(tree_dfs_order_start_q=torch.zeros(3, dtype=torch.int32)),
            treeattn.InvalidArgument, "tree_dfs_order_start_q has 3 elements",
        ),
        (
            dict(attention_mask=torch.tensor([[0] + [1] * (TOKENS - 1)])),
            treeattn.InvalidArgument, "attention_mask",
        ),
        (dict(use_cache=True), None, None),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(change, error, text):
    arguments, rows = tree()
    arguments.update(change)
    if error is None:
        make()(**arguments)  # a cache that is empty is no obstacle
        return
    with pytest.raises(error, match=text):
        make()(**arguments)


def test_windows_dropout_and_sinks_are_refused_by_name():
    arguments, rows = tree()
    model = make(kind="Mistral", sliding_window=4)
    with pytest.raises(treeattn.Unsupported, match="window_size"):
        model(**arguments)
    wide = make(kind="Mistral", sliding_window=TOKENS)
    wide(**arguments)
    with pytest.raises(treeattn.Unsupported, match="dropout_p"):
        make(attention_dropout=0.1).train()(**arguments)
    from transformers import modeling_flash_attention_utils as utils

    q = torch.randn(1, 4, 2, 16)
    with pytest.raises(treeattn.Unsupported, match="attention sinks"):
        utils._flash_attention_forward(q, q, q, None, 4, True, s_aux=torch.zeros(2))


def test_repeated_patching_changes_nothing():
    from transformers import modeling_flash_attention_utils as utils

    before = utils._flash_attention_forward
    patch_FA_tree_attn()
    assert utils._flash_attention_forward is before


def test_a_version_that_cannot_be_patched_is_refused(monkeypatch):
    from transformers import modeling_flash_attention_utils as utils

    def other(query_states, key_states, value_states, attention_mask, length):
        pass

    monkeypatch.setattr(utils, "_flash_attention_forward", other)
    with pytest.raises(treeattn.Unsupported, match="cannot be patched.*query_length"):
        patch_fa_tree_attn.patch_FA_tree_attn()
    assert utils._flash_attention_forward is other
