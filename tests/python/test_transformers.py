"""transformers models with attn_implementation="tree_attn" against the unshared rows."""

import copy
import gc
import os
import types
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import treeattn  # noqa: E402

try:
    treeattn._native.load()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

from tiny_models import (  # noqa: E402
    FAMILIES, NODES, SECOND, VOCABULARY, Tree, gradients, make, other, packed_loss, row_weights,
    rows_loss, tokens,
)  # fmt: skip

treeattn.register()

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TREE = Tree(NODES)
PADDED_BATCH = dict(left=[[0] * 4 + [1] * 8, [1] * 12], right=[[1] * 12, [1] * 7 + [0] * 5])


def dtype_of(device):
    return torch.float32 if device == "cpu" else torch.bfloat16


def how_to_give(form, tree, device):
    if form == "plan":
        return {"tree_plan": tree.plan(device)}
    return tree.arrays(device)


def error(got, wanted):
    return ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()


def allowed(device, noise):
    """Bounds of an error: f32 noise on the CPU, else twice what bf16 costs the unshared rows."""
    return 2e-5 if device == "cpu" else max(2 * noise, 4e-3)


def train(model, ids, tree, form="plan", weights=None, **arguments):
    """Logits [tokens, vocabulary] and gradients of a packed tree."""
    weights = weights or row_weights(tree)
    given = how_to_give(form, tree, ids.device)
    logits = model(
        ids, position_ids=tree.positions(ids.device), use_cache=False, **given, **arguments
    ).logits[0]
    packed_loss(logits, tree, weights).backward()
    return logits.detach(), gradients(model)


def assert_same(got, wanted, device="cpu"):
    """Gradients: equal within f32 noise, on a GPU within what bf16 and another order cost."""
    for name in wanted:
        if device == "cpu":
            torch.testing.assert_close(got[name], wanted[name], msg=lambda m: f"{name}: {m}")
        else:
            assert error(got[name], wanted[name]) < 5e-2, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["plan", "arrays"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_of_the_tree_are_those_of_the_rows(family, form, device):
    model = make(family, device, dtype_of(device))
    ids, weights = tokens(TREE.tokens, device), row_weights(TREE)
    exact = other(model, dtype=torch.float32)
    loss, wanted_logits = rows_loss(exact, ids, TREE, weights)
    loss.backward()
    wanted = gradients(exact)
    plain = other(model)  # what the dtype alone costs
    loss, plain_logits = rows_loss(plain, ids, TREE, weights)
    loss.backward()
    plain_gradients = gradients(plain)

    logits, got = train(model, ids, TREE, form)
    for row, want, rough in zip(TREE.rows, wanted_logits, plain_logits):
        assert error(logits[row], want) < allowed(device, error(rough, want))
    for name in wanted:
        noise = error(plain_gradients[name], wanted[name])
        assert error(got[name], wanted[name]) < allowed(device, noise), name


def test_the_tree_matters():
    """Causal attention over the packed tokens is something else: the test above can fail."""
    model = make()
    ids = tokens(TREE.tokens)
    with_tree = model(ids, tree_plan=TREE.plan()).logits[0]
    without = model(ids, position_ids=TREE.positions(), attention_mask=None, use_cache=True)
    assert error(with_tree[TREE.rows[-1]], without.logits[0][TREE.rows[-1]]) > 0.01


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["cu_seq_lens", "batch"])
def test_several_trees_in_one_batch(layout, device):
    model = make(device=device, dtype=dtype_of(device))
    trees = [TREE, Tree(SECOND)] if layout == "cu_seq_lens" else [TREE, TREE]
    ids = [tokens(tree.tokens, device, seed) for seed, tree in enumerate(trees)]
    alone = [model(x, **t.arrays(device), use_cache=False).logits[0] for x, t in zip(ids, trees)]
    axis = 1 if layout == "cu_seq_lens" else 0
    given = {
        name: torch.stack([t.arrays(device)[name] for t in trees])
        if axis == 0
        else torch.cat([t.arrays(device)[name] for t in trees])
        for name in TREE.arrays()
    }
    if axis == 1:
        cu = torch.tensor([0, trees[0].tokens, trees[0].tokens + trees[1].tokens], device=device)
        given |= dict(cu_seq_lens_q=cu.int(), cu_seq_lens_k=cu.int())
    logits = model(torch.cat(ids, axis), **given, use_cache=False).logits
    together = logits[0].split([t.tokens for t in trees]) if axis == 1 else list(logits)
    for got, want in zip(together, alone):
        assert error(got, want) < (1e-5 if device == "cpu" else 3e-2)


def test_position_ids_left_out_are_depths():
    seen = []
    model = make()
    model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids", args[-1])),
        with_kwargs=True,
    )
    second = Tree(SECOND)
    ids = tokens(TREE.tokens + second.tokens)
    model(tokens(TREE.tokens), tree_plan=TREE.plan())
    model(tokens(TREE.tokens), **TREE.arrays())
    both = {
        name: torch.cat([TREE.arrays()[name], second.arrays()[name]]) for name in TREE.arrays()
    }
    cu = [0, TREE.tokens, TREE.tokens + second.tokens]
    model(ids, tree_plan=treeattn.plan(cu, **both))
    wanted = [TREE.depths, TREE.depths, TREE.depths + second.depths]
    assert [x[0].tolist() for x in seen] == wanted


def test_arguments_given_by_place():
    model = make()
    ids, positions = tokens(TREE.tokens), TREE.positions()
    wanted = model(ids, tree_plan=TREE.plan()).logits
    torch.testing.assert_close(model(ids, None, positions, tree_plan=TREE.plan()).logits, wanted)
    with pytest.raises(treeattn.InvalidArgument, match="attention_mask was given"):
        model(ids, torch.ones_like(ids), positions, tree_plan=TREE.plan())


def test_a_plan_of_intervals_and_its_own_position_ids():
    model = make()
    ids = tokens(6)
    plan = treeattn.plan([0, 6], first=[0, 1, 2, 3, 4, 5], length=[6, 2, 1, 3, 2, 1])
    logits = model(ids, tree_plan=plan).logits[0]
    with_positions = treeattn.plan(
        [0, 6], first=[0, 1, 2, 3, 4, 5], length=[6, 2, 1, 3, 2, 1],
        position_ids=torch.tensor([0, 1, 2, 1, 2, 3]),
    )  # fmt: skip
    torch.testing.assert_close(model(ids, tree_plan=with_positions).logits[0], logits)
    rows = other(model)
    for row in ([0, 1, 2], [0, 3, 4, 5]):
        torch.testing.assert_close(logits[row], rows(ids[:, row]).logits[0])


def test_tile_lists_are_built_once_a_batch(monkeypatch):
    from treeattn import attention

    built = []
    build = attention._engine.build_lists
    monkeypatch.setattr(
        attention._engine, "build_lists", lambda *a, **k: built.append(1) or build(*a, **k)
    )
    model = make(num_hidden_layers=4)
    ids = tokens(TREE.tokens)
    for given in (how_to_give("plan", TREE, "cpu"), TREE.arrays()):
        built.clear()
        model(ids, **given).logits.sum().backward()
        assert len(built) == 1
    built.clear()
    mask = torch.tensor(PADDED_BATCH["left"])
    model(tokens(12, batch=2), attention_mask=mask).logits.sum().backward()
    assert len(built) == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["plan", "arrays"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, form, device):
    ids = tokens(TREE.tokens, device)
    plain_logits, plain = train(make(device=device, dtype=dtype_of(device)), ids, TREE)
    model = make(device=device, dtype=dtype_of(device)).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    logits, got = train(model, ids, TREE, form)
    torch.testing.assert_close(logits, plain_logits)
    assert_same(got, plain, device)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device):
    ids = tokens(TREE.tokens, device)
    exact_logits, exact = train(make(device=device).cpu(), ids.cpu(), TREE)
    model = make(device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        logits, got = train(model, ids, TREE)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert error(logits.cpu(), exact_logits) < 3e-2
    for name in exact:
        assert error(got[name].cpu(), exact[name]) < 6e-2, name


@pytest.mark.parametrize("device", DEVICES)
def test_deterministic_algorithms_give_the_same_bits(device):
    ids = tokens(TREE.tokens, device)
    model = make(device=device, dtype=dtype_of(device))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            model.zero_grad()
            runs.append(train(model, ids, TREE))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(runs[0][0], runs[1][0])
    for name in runs[0][1]:
        assert torch.equal(runs[0][1][name], runs[1][1][name]), name


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


def backend_of(device):
    return "aot_eager" if device == "cpu" else "inductor"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["plan", "arrays"])
def test_compile_without_graph_break(form, device, dynamo):
    family = {"plan": "qwen3", "arrays": "llama"}[form]  # Qwen3's configuration lists its layers
    model = make(family, device, dtype_of(device))
    compiled = torch.compile(model, backend=backend_of(device), fullgraph=True)
    for nodes in (NODES, [(-1, 9), (0, 4), (0, 7)], [(-1, 3), (0, 2), (1, 9)]):
        tree = Tree(nodes)
        ids = tokens(tree.tokens, device, seed=tree.tokens)
        model.zero_grad()
        eager_logits, eager = train(model, ids, tree)
        model.zero_grad()
        weights = row_weights(tree)
        given = how_to_give(form, tree, device)
        logits = compiled(
            ids, position_ids=tree.positions(device), use_cache=False, **given
        ).logits[0]
        packed_loss(logits, tree, weights).backward()
        bounds = {} if device == "cpu" else dict(atol=5e-2, rtol=5e-2)
        torch.testing.assert_close(logits, eager_logits, **bounds)
        assert_same(gradients(model), eager, device)
    # The first tree, then any length.
    assert dynamo["unique_graphs"] <= 2


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_layers_in_an_eager_model(device, dynamo):
    ids = tokens(TREE.tokens, device)
    logits, wanted = train(make(device=device, dtype=dtype_of(device)), ids, TREE)
    model = make(device=device, dtype=dtype_of(device))
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    got_logits, got = train(model, ids, TREE)
    bounds = {} if device == "cpu" else dict(atol=5e-2, rtol=5e-2)
    torch.testing.assert_close(got_logits, logits, **bounds)
    assert_same(got, wanted, device)


def test_compile_with_checkpointing(dynamo):
    ids = tokens(TREE.tokens)
    _, wanted = train(make(num_hidden_layers=1), ids, TREE)
    model = make(num_hidden_layers=1).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, backend="aot_eager")
    logits = compiled(ids, position_ids=TREE.positions(), tree_plan=TREE.plan()).logits[0]
    packed_loss(logits, TREE, row_weights(TREE)).backward()
    assert_same(gradients(model), wanted)


def test_compile_without_a_tree(dynamo):
    model = make(num_hidden_layers=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids, mask = tokens(12, batch=2), torch.tensor(PADDED_BATCH["left"])
    wanted = other(model)(ids, attention_mask=mask, use_cache=False).logits
    got = compiled(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()])
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    got = compiled(ids[:1], position_ids=positions, use_cache=False).logits
    wanted = [model(x, use_cache=False).logits for x in ids[:1].split([5, 7], 1)]
    torch.testing.assert_close(got, torch.cat(wanted, 1))


# Without a tree.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", PADDED_BATCH)
def test_padding_is_not_seen(side, device):
    model = make(device=device, dtype=dtype_of(device))
    plain = other(model)
    ids, mask = tokens(12, device, batch=2), torch.tensor(PADDED_BATCH[side], device=device)
    weights = torch.randn((2, 12, VOCABULARY), device=device) * mask[..., None]
    results = []
    for candidate in (model, plain):
        logits = candidate(ids, attention_mask=mask, use_cache=False).logits
        (logits.float() * weights).sum().backward()
        results.append((logits[mask.bool()].detach(), gradients(candidate)))
    assert error(results[0][0], results[1][0]) < (1e-5 if device == "cpu" else 3e-2)
    for name, wanted in results[1][1].items():
        assert error(results[0][1][name], wanted) < (1e-5 if device == "cpu" else 5e-2), name
        assert torch.isfinite(results[0][1][name]).all()


@pytest.mark.parametrize("form", ["max_length", "max_seqlen", "positions", "positions_and_mask"])
def test_padding_free_batches_are_not_merged(form):
    model = make()
    lengths = [4, 1, 7]
    ids = tokens(sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    cu = torch.tensor([0, 4, 5, 12], dtype=torch.int32)
    given = dict(position_ids=positions)
    if form.startswith("max"):
        given |= dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu)
        given |= {f"{form}_q": 7, f"{form}_k": 7}
    elif form == "positions_and_mask":
        given |= dict(attention_mask=torch.ones_like(ids))
    together = model(ids, use_cache=False, **given).logits
    alone = [model(x, use_cache=False).logits for x in ids.split(lengths, 1)]
    torch.testing.assert_close(together, torch.cat(alone, 1))


def test_positions_that_only_leave_some_out_are_one_sequence():
    model = make()
    ids = tokens(8)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1]])
    positions = torch.tensor([[0, 1, 1, 2, 3, 4, 1, 5]])
    got = model(ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
    wanted = other(model)(ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate(cache, device):
    # In bf16 two candidates may be as good as equal; in f32 the CPU's choice is the same.
    model = make(device=device, dtype=dtype_of(device))
    ids, mask = tokens(12, device, batch=2), torch.tensor(PADDED_BATCH["left"], device=device)
    options = dict(
        attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True, cache_implementation=cache,
        disable_compile=True,
    )  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None}
    got, wanted = model.generate(ids, **options), other(model).generate(ids, **options)
    if device == "cpu":
        assert torch.equal(got.sequences, wanted.sequences)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(wanted.logits))
    else:
        assert error(got.logits[0], wanted.logits[0]) < 2e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_generate_compiled_with_graphs(dynamo):
    model = make(device="cuda", dtype=torch.bfloat16)
    ids = tokens(12, "cuda", batch=2)
    options = dict(
        attention_mask=torch.tensor(PADDED_BATCH["left"], device="cuda"), max_new_tokens=6,
        do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        cache_implementation="static",
    )  # fmt: skip
    wanted = model.generate(ids, **options, disable_compile=True)
    got = model.generate(ids, **options)
    same = (got.sequences == wanted.sequences).all(0).tolist().index(False) if not torch.equal(
        got.sequences, wanted.sequences
    ) else got.sequences.shape[1]  # fmt: skip
    assert same > ids.shape[1] + 1
    for step in range(same - ids.shape[1]):
        assert error(got.logits[step], wanted.logits[step]) < 3e-2


def test_a_cache_continued_with_several_tokens():
    model = make()
    ids = tokens(12)
    whole = model(ids).logits
    first = model(ids[:, :7], use_cache=True)
    name = "cache" if getattr(first, "past_key_values", None) is None else "past_key_values"
    rest = model(ids[:, 7:], **{name: getattr(first, name)})
    torch.testing.assert_close(rest.logits, whole[:, 7:])


def test_plans_made_in_inference_mode_serve_training():
    model = make()
    ids, plan = tokens(TREE.tokens), TREE.plan()
    with torch.inference_mode():
        wanted = model(ids, tree_plan=plan).logits
    got = model(ids, tree_plan=plan).logits
    got.sum().backward()
    torch.testing.assert_close(got, wanted.clone())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_plan_on_the_cpu_is_copied_once():
    model, plan = make(device="cuda", dtype=torch.bfloat16), TREE.plan()
    ids = tokens(TREE.tokens, "cuda")
    wanted = model(ids, tree_plan=TREE.plan("cuda")).logits
    positions = TREE.positions("cuda")
    torch.testing.assert_close(model(ids, position_ids=positions, tree_plan=plan).logits, wanted)
    assert plan.to("cuda") is plan.to(torch.device("cuda:0")) is not plan
    assert plan.to("cpu") is plan


def test_modules_that_are_not_causal_see_everything():
    config = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=4,
    )  # fmt: skip
    config._attn_implementation = "tree_attn"
    torch.manual_seed(0)
    model = transformers.SiglipVisionModel(config).eval()
    pixels = torch.randn((2, 3, 16, 16))
    wanted = other(model)(pixels).last_hidden_state
    torch.testing.assert_close(model(pixels).last_hidden_state, wanted)


def test_a_text_encoder_with_padding():
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    config._attn_implementation = "tree_attn"
    torch.manual_seed(0)
    try:
        model = transformers.BertModel(config).eval()
    except (KeyError, ValueError) as refused:
        pytest.skip(f"this version's text encoders take no attention of others: {refused}")
    ids, mask = tokens(12, batch=2), torch.tensor(PADDED_BATCH["right"])
    wanted = other(model)(ids, attention_mask=mask).last_hidden_state
    got = model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()])


def test_a_decoder_made_bidirectional():
    model = make()
    model.config.is_causal = False
    ids = tokens(9)
    got, wanted = model(ids).logits, other(model)(ids).logits
    causal = make()(ids).logits
    if torch.allclose(wanted, causal, atol=1e-4):
        pytest.skip("this version of transformers takes no notice of config.is_causal")
    torch.testing.assert_close(got, wanted)
    with pytest.raises(treeattn.Unsupported, match="full attention and a tree"):
        model(tokens(TREE.tokens), tree_plan=TREE.plan())


# Trees that get lost.


def drop_arguments(layer):
    """A layer that passes on only what it knows, as models that were not written for this do."""
    forward = layer.forward

    def without(hidden_states, attention_mask=None, position_embeddings=None, **ignored):
        return forward(
            hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings
        )

    layer.forward = without


@pytest.mark.parametrize("form", ["plan", "arrays"])
def test_a_layer_whose_arguments_are_dropped_is_named(form):
    model = make()
    drop_arguments(model.model.layers[1])
    ids = tokens(TREE.tokens)
    with pytest.raises(treeattn.TreeAttnError, match="layer 1 .*ran without the tree"):
        model(ids, position_ids=TREE.positions(), **how_to_give(form, TREE, "cpu"))
    # The refusal leaves nothing behind.
    plain = model(ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(plain, other(model)(ids).logits)


def test_a_layer_whose_arguments_are_dropped_is_named_when_compiled(dynamo):
    model = make(num_hidden_layers=1)
    drop_arguments(model.model.layers[0])
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(Exception, match="ran without the tree"):
        compiled(tokens(TREE.tokens), position_ids=TREE.positions(), tree_plan=TREE.plan())


def test_a_layer_compiled_on_its_own_whose_arguments_are_dropped_is_named(dynamo):
    model = make()
    drop_arguments(model.model.layers[1])
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    with pytest.raises(Exception, match="ran without the tree"):
        model(tokens(TREE.tokens), tree_plan=TREE.plan())


def test_a_dropping_layer_is_named_under_checkpointing():
    model = make().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    drop_arguments(model.model.layers[0])
    with pytest.raises(treeattn.TreeAttnError, match="layer 0 .*ran without the tree"):
        model(tokens(TREE.tokens), tree_plan=TREE.plan())


def test_a_layer_with_another_attention_is_named():
    model = make()
    module = model.model.layers[1].self_attn
    module.config = copy.deepcopy(module.config)
    module.config._attn_implementation = "sdpa"
    # Its mask is SDPA's there, as if the model had made it.
    forward = module.forward
    module.forward = lambda *a, **k: forward(*a, **{**k, "attention_mask": None})
    with pytest.raises(treeattn.TreeAttnError, match="layer 1 .*ran without the tree"):
        model(tokens(TREE.tokens), tree_plan=TREE.plan())


def test_a_model_that_swallows_the_tree_is_named():
    model = make()
    inner = model.model.forward

    def swallow(self, input_ids=None, position_ids=None, inputs_embeds=None, **ignored):
        return inner(input_ids=input_ids, position_ids=position_ids)

    model.model.forward = types.MethodType(swallow, model.model)
    with pytest.raises(treeattn.TreeAttnError, match="ran without the tree"):
        model(tokens(TREE.tokens), tree_plan=TREE.plan())


def test_a_model_with_another_attention_is_refused():
    model = other(make())
    with pytest.raises(treeattn.InvalidArgument, match="'sdpa'"):
        model(tokens(TREE.tokens), tree_plan=TREE.plan())
    with pytest.raises(treeattn.InvalidArgument, match="'sdpa'"):
        model(tokens(TREE.tokens), **TREE.arrays())


def test_watching_keeps_no_model_alive():
    model = make()
    model(tokens(TREE.tokens), tree_plan=TREE.plan())
    gone = []
    import weakref

    weakref.finalize(model, gone.append, True)
    del model
    gc.collect()
    assert gone


def test_a_watched_model_can_be_copied_and_saved(tmp_path):
    model = make()
    ids = tokens(TREE.tokens)
    wanted = model(ids, tree_plan=TREE.plan()).logits
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(ids, tree_plan=TREE.plan()).logits, wanted)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    torch.testing.assert_close(loaded(ids, tree_plan=TREE.plan()).logits, wanted)


# What is refused.


def sliding_model():
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, use_sliding_window=True, sliding_window=4,
        max_window_layers=1,
    )  # fmt: skip
    config._attn_implementation = "tree_attn"
    return transformers.Qwen2ForCausalLM(config).eval()


@pytest.mark.parametrize("given", [True, False])
def test_sliding_windows_are_refused_by_the_name_of_the_layer(given):
    arguments = {"tree_plan": TREE.plan()} if given else {}
    with pytest.raises(treeattn.Unsupported, match=r"layer 1 \(Qwen2Attention\).*sliding window"):
        sliding_model()(tokens(TREE.tokens), **arguments)


def test_dropout_is_refused_in_training_only():
    model = make(attention_dropout=0.1)
    model(tokens(TREE.tokens), tree_plan=TREE.plan())
    with pytest.raises(treeattn.Unsupported, match="dropout of 0.1"):
        model.train()(tokens(TREE.tokens), tree_plan=TREE.plan())


def attend(module=None, **arguments):
    from treeattn import hf

    q = torch.randn((1, 2, TREE.tokens, 16))
    return hf.tree_attn(module or torch.nn.Module(), q, q, q, **arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(s_aux=torch.zeros(2)), "attention sinks"),
        (dict(position_bias=torch.zeros(1)), "position bias"),
        (dict(head_mask=torch.zeros(2)), "head mask"),
        (dict(output_attentions=True), "output_attentions"),
        (dict(attention_mask=torch.zeros((1, 1, 5, 5))), "a mask of its own"),
    ],
)
def test_what_the_kernels_do_not_compute_is_refused(arguments, text):
    with pytest.raises(treeattn.Unsupported, match=text):
        attend(**arguments)


def test_overlaid_masks_are_refused():
    from transformers import masking_utils

    model = make()
    embeddings = model.get_input_embeddings()(tokens(6))
    arguments = dict(
        config=model.config, attention_mask=None, past_key_values=None,
        or_mask_function=lambda b, h, q, kv: kv < 3,
    )  # fmt: skip
    try:
        mask = masking_utils.create_causal_mask(inputs_embeds=embeddings, **arguments)
    except TypeError:
        mask = masking_utils.create_causal_mask(
            input_embeds=embeddings, cache_position=torch.arange(6), **arguments
        )
    with pytest.raises(treeattn.Unsupported, match="a mask other than causal"):
        attend(attention_mask=mask)


def test_overlaid_masks_are_refused_when_compiled(dynamo):
    from transformers import masking_utils

    from treeattn import _hf_masks

    def overlay(b, h, q, kv):
        return kv < 3

    @torch.compile(backend="aot_eager", fullgraph=True)
    def mask_of(x):
        function = masking_utils.or_masks(masking_utils.causal_mask_function, overlay)
        return x + _hf_masks.make_mask(
            batch_size=1, q_length=6, kv_length=6, mask_function=function, device=x.device
        )

    with pytest.raises(RuntimeError, match="causal masks only"):
        mask_of(torch.zeros(6))


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        (dict(tree_plan="tree"), treeattn.InvalidArgument, "tree_plan is a str"),
        (
            dict(tree_plan=Tree(SECOND).plan()), treeattn.InvalidArgument,
            "the tree has 8 query and 8 key tokens",
        ),
        (Tree(SECOND).arrays(), treeattn.InvalidArgument, "has 8 elements"),
        (
            dict(tree_dfs_order_start_q=torch.zeros(TREE.tokens, dtype=torch.int32)),
            treeattn.InvalidArgument, "tree_dfs_order_end_k is missing",
        ),
        (
            dict(tree_plan=TREE.plan(), **TREE.arrays()), treeattn.InvalidArgument,
            "expected a plan or both arrays",
        ),
        (
            dict(tree_plan=TREE.plan(), attention_mask=torch.ones((1, TREE.tokens))),
            treeattn.InvalidArgument, "attention_mask was given",
        ),
        (
            dict(tree_plan=TREE.plan(), attention_mask=torch.ones((1, 1, 20, 20))),
            treeattn.InvalidArgument, "attention_mask was given",
        ),
    ],
)  # fmt: skip
def test_trees_that_do_not_fit_are_refused(arguments, kind, text):
    with pytest.raises(kind, match=text):
        make()(tokens(TREE.tokens), position_ids=TREE.positions(), **arguments)


def test_a_tree_of_other_tokens_is_refused_where_positions_are_left_out():
    text = "8 query tokens and LlamaForCausalLM got 1 x 20"
    with pytest.raises(treeattn.InvalidArgument, match=text):
        make()(tokens(TREE.tokens), tree_plan=Tree(SECOND).plan())


def test_padding_free_rows_of_a_batch_are_refused():
    cu = torch.tensor([0, 4, 12], dtype=torch.int32)
    with pytest.raises(treeattn.Unsupported, match="a batch of 2"):
        make()(tokens(6, batch=2), cu_seq_lens_q=cu, cu_seq_lens_k=cu)


@pytest.mark.parametrize("form", ["plan", "arrays"])
def test_a_tree_on_top_of_a_cache_is_refused(form):
    model = make()
    first = model(tokens(4), use_cache=True)
    name = "cache" if getattr(first, "past_key_values", None) is None else "past_key_values"
    with pytest.raises(treeattn.Unsupported, match="KV cache is not empty"):
        model(
            tokens(TREE.tokens), position_ids=TREE.positions() + 4,
            **how_to_give(form, TREE, "cpu"), **{name: getattr(first, name)},
        )  # fmt: skip


def test_a_plan_over_cached_keys_is_computed():
    """A cached prompt and a tree of drafts below it: the plan says so itself."""
    model = make()
    prompt = TREE.start.count(0)
    ids = tokens(TREE.tokens)
    wanted = model(ids, tree_plan=TREE.plan()).logits[:, prompt:]
    first = model(ids[:, :prompt], use_cache=True)
    name = "cache" if getattr(first, "past_key_values", None) is None else "past_key_values"
    plan = treeattn.plan(
        [0, TREE.tokens - prompt], [0, TREE.tokens],
        tree_dfs_order_start_q=TREE.start[prompt:], tree_dfs_order_end_k=TREE.end,
    )  # fmt: skip
    got = model(
        ids[:, prompt:], position_ids=TREE.positions()[:, prompt:], tree_plan=plan,
        **{name: getattr(first, name)},
    )  # fmt: skip
    torch.testing.assert_close(got.logits, wanted)


def test_hybrids_with_linear_attention_are_refused():
    if not hasattr(transformers, "Qwen3NextConfig"):
        pytest.skip("this version of transformers has no Qwen3-Next")
    config = transformers.Qwen3NextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, linear_num_value_heads=2,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    config._attn_implementation = "tree_attn"
    model = transformers.Qwen3NextForCausalLM(config).eval()
    with pytest.raises(treeattn.Unsupported, match="linear_attention"):
        model(tokens(TREE.tokens), tree_plan=TREE.plan())


def test_hybrids_that_do_not_tell_are_refused():
    class DepthwiseMixer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer_idx = 0
            self.conv1d = torch.nn.Conv1d(8, 8, 4, groups=8)

    model = make()
    model.model.layers[0].mixer = DepthwiseMixer()
    with pytest.raises(treeattn.Unsupported, match="DepthwiseMixer.* mixes tokens"):
        model(tokens(TREE.tokens), tree_plan=TREE.plan())


def test_shifted_labels_are_warned_of():
    model = make()
    ids = tokens(TREE.tokens)
    with pytest.warns(UserWarning, match="packed order"):
        model(ids, tree_plan=TREE.plan(), labels=ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, tree_plan=TREE.plan())


@pytest.mark.parametrize("form", ["plan", "arrays"])
def test_trainer(form, tmp_path):
    pytest.importorskip("accelerate")

    class TreeTrainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **ignored):
            logits = model(**inputs).logits[0]
            return packed_loss(logits, TREE, row_weights(TREE))

    def collate(examples):
        (example,) = examples
        return {**example, "position_ids": TREE.positions(), **how_to_give(form, TREE, "cpu")}

    def trained(model, trainer):
        ids = tokens(TREE.tokens)
        if trainer:
            options = transformers.TrainingArguments(
                output_dir=str(tmp_path), per_device_train_batch_size=1, max_steps=1,
                learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0,
                remove_unused_columns=False, report_to=[], save_strategy="no", use_cpu=True,
                disable_tqdm=True,
            )  # fmt: skip
            TreeTrainer(model, options, collate, [{"input_ids": ids}]).train()
        else:
            train(model, ids, TREE)
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        return dict(model.named_parameters())

    before = dict(make().named_parameters())
    got, wanted = trained(make(), True), trained(make(), False)
    for name in wanted:
        torch.testing.assert_close(got[name].cpu(), wanted[name], msg=lambda m: f"{name}: {m}")
    assert any(not torch.equal(before[name], got[name].cpu()) for name in before)


EVERY_PART = ("model.embed_tokens", "model.rotary_emb", "model.layers", "model.norm", "lm_head")


@pytest.mark.parametrize("form", ["plan", "arrays"])
@pytest.mark.parametrize("places", ["whole", "parts", "disk", "cpu_offload"])
def test_hooks_of_a_device_map_pass_the_tree_on(places, form, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    ids = tokens(TREE.tokens)
    wanted_logits, wanted = train(make(), ids, TREE, form)
    model = make()
    if places == "cpu_offload":
        model = accelerate.cpu_offload(model, torch.device("cpu"))
    else:
        device_map = {"": "cpu"} if places == "whole" else dict.fromkeys(EVERY_PART, "cpu")
        if places == "disk":
            del device_map["model.layers"]
            device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
        model = accelerate.dispatch_model(
            model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True
        )
    assert hasattr(model, "_hf_hook")
    if places in ("whole", "parts"):
        logits, got = train(model, ids, TREE, form)
        assert_same(got, wanted)
    else:  # weights that come and go have no gradients
        logits = model(ids, **how_to_give(form, TREE, "cpu")).logits[0]
    torch.testing.assert_close(logits, wanted_logits)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "disk"])
def test_from_pretrained_with_a_device_map(device_map, tmp_path):
    pytest.importorskip("accelerate")
    if device_map == "disk":
        device_map = dict.fromkeys(EVERY_PART, "cpu") | {"model.layers": "disk"}
    make().save_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload",
        attn_implementation="tree_attn",
    )  # fmt: skip
    ids = tokens(TREE.tokens)
    wanted = make()(ids, tree_plan=TREE.plan()).logits
    torch.testing.assert_close(model(ids, tree_plan=TREE.plan()).logits, wanted)


def test_plans_move_as_tensors_do():
    plan = TREE.plan()
    assert plan.to(None) is plan is plan.to("cpu", non_blocking=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_is_synchronised():
    from treeattn import hf

    q = torch.randn((1, 2, TREE.tokens, 16), device="cuda", dtype=torch.bfloat16)
    q.requires_grad_()
    forms = [how_to_give(form, TREE, "cuda") for form in ("plan", "arrays")]
    module = torch.nn.Module()
    hf.tree_attn(module, q, q, q, **forms[0])[0].sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for given in forms:
            hf.tree_attn(module, q, q, q, **given)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
