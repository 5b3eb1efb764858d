"""transformers models wrapped by PEFT: adapters trained on a tree against the unshared rows."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import treeattn  # noqa: E402

try:
    treeattn._native.load()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

from tiny_models import (  # noqa: E402
    NODES, Tree, make, other, packed_loss, row_weights, rows_loss, tokens,
)  # fmt: skip

treeattn.register()

TREE = Tree(NODES)
FAMILIES = ["llama", "qwen3"]


def wrap(model, **changes):
    """A model with LoRA on its queries and values, with weights that do something."""
    options = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{**options, **changes}))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return wrapped


def how_to_give(form):
    return {"tree_plan": TREE.plan()} if form == "plan" else TREE.arrays()


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    assert found and all("lora_" in name for name in found)
    return found


def train(model, ids, form="plan"):
    """Logits [tokens, vocabulary] and gradients of the adapters on a packed tree."""
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False, **how_to_give(form)).logits[0]
    packed_loss(logits, TREE, row_weights(TREE)).backward()
    return logits.detach(), gradients(model)


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("form", ["plan", "arrays"])
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_the_tree_learn_what_those_of_the_rows_do(family, task_type, form):
    model = wrap(make(family), task_type=task_type)
    ids = tokens(TREE.tokens)
    rows = wrap(make(family, implementation="sdpa"), task_type=task_type)
    loss, wanted_logits = rows_loss(rows, ids, TREE, row_weights(TREE))
    loss.backward()
    logits, got = train(model, ids, form)
    for row, wanted in zip(TREE.rows, wanted_logits):
        torch.testing.assert_close(logits[row], wanted)
    assert_same(got, gradients(rows))


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"target_modules": "all-linear"}])
def test_other_forms_of_lora(changes):
    model = wrap(make(), **changes)
    ids = tokens(TREE.tokens)
    logits, got = train(model, ids)
    rows = other(model.base_model.model)
    for parameter in rows.parameters():
        parameter.grad = None
    loss, wanted_logits = rows_loss(rows, ids, TREE, row_weights(TREE))
    loss.backward()
    for row, wanted in zip(TREE.rows, wanted_logits):
        torch.testing.assert_close(logits[row], wanted)
    assert_same({n.removeprefix("base_model.model."): g for n, g in got.items()}, gradients(rows))


def test_a_merged_model_takes_the_tree():
    model = wrap(make())
    ids = tokens(TREE.tokens)
    wanted = model(input_ids=ids, tree_plan=TREE.plan()).logits
    merged = model.merge_and_unload()
    assert isinstance(merged, transformers.PreTrainedModel)
    torch.testing.assert_close(merged(ids, tree_plan=TREE.plan()).logits, wanted)


def test_adapters_in_a_trainer(tmp_path):
    pytest.importorskip("accelerate")

    class TreeTrainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **ignored):
            return packed_loss(model(**inputs).logits[0], TREE, row_weights(TREE))

    ids = tokens(TREE.tokens)
    before = {name: p.detach().clone() for name, p in wrap(make()).named_parameters()}
    _, wanted = train(wrap(make()), ids)
    model = wrap(make())
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=1, max_steps=1, learning_rate=0.1,
        optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, remove_unused_columns=False,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    collate = lambda examples: {**examples[0], **how_to_give("plan")}  # noqa: E731
    TreeTrainer(model, options, collate, [{"input_ids": ids}]).train()
    for name, parameter in model.named_parameters():
        step = 0.1 * wanted[name] if name in wanted else 0.0
        torch.testing.assert_close(parameter.detach(), before[name] - step)


def test_without_its_adapters_the_model_is_the_reference():
    """As DPO and GRPO have it: one model, its adapters switched off for the reference."""
    model = wrap(make())
    rows = [torch.tensor([1, 2, 3, *answer]) for answer in ([4, 5], [4, 6, 7], [8])]
    batch = treeattn.pack(rows, prompt_lengths=[3] * 3, device="cpu")
    with torch.no_grad(), model.disable_adapter():
        reference = batch.token_log_probs(model(**batch.model_inputs()).logits)
    trained = batch.token_log_probs(model(**batch.model_inputs()).logits)
    alone = other(make())
    for row, got, changed in zip(rows, batch.unpack(reference), batch.unpack(trained)):
        wanted = alone(row[None]).logits[0, :-1].log_softmax(-1)
        wanted = wanted.gather(1, row[1:, None])[:, 0]
        torch.testing.assert_close(got[3:], wanted[2:])
        assert not torch.allclose(changed[3:], wanted[2:], atol=1e-3)
    trained.sum().backward()
    assert all(gradient.abs().sum() > 0 for gradient in gradients(model).values())


@pytest.mark.parametrize("form", ["plan", "arrays"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_with_inputs_that_require_gradients(reentrant, form):
    ids = tokens(TREE.tokens)
    wanted_logits, wanted = train(wrap(make()), ids)
    model = wrap(make()).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    logits, got = train(model, ids, form)
    torch.testing.assert_close(logits, wanted_logits)
    assert_same(got, wanted)


def test_a_model_prepared_for_quantised_training():
    ids = tokens(TREE.tokens)
    _, wanted = train(wrap(make()), ids)
    model = make()
    model.is_loaded_in_8bit = True  # what makes PEFT switch checkpointing on
    model = peft.prepare_model_for_kbit_training(
        model, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    assert model.model.gradient_checkpointing or model.model.layers[0].gradient_checkpointing
    _, got = train(wrap(model).train(), ids)
    assert_same(got, wanted)


def test_adapters_on_a_model_with_a_device_map():
    accelerate = pytest.importorskip("accelerate")
    ids = tokens(TREE.tokens)
    _, wanted = train(wrap(make()), ids)
    model = accelerate.dispatch_model(make(), {"": "cpu"}, main_device="cpu", force_hooks=True)
    _, got = train(wrap(model), ids)
    assert_same(got, wanted)


def test_compiled():
    torch._dynamo.reset()
    model = wrap(make(num_hidden_layers=1))
    ids = tokens(TREE.tokens)
    _, wanted = train(model, ids)
    _, got = train(torch.compile(model, backend="aot_eager"), ids)
    assert_same({name.removeprefix("_orig_mod."): g for name, g in got.items()}, wanted)
    torch._dynamo.reset()


def test_saved_adapters_load_onto_a_model_with_tree_attention(tmp_path):
    model = wrap(make())
    ids = tokens(TREE.tokens)
    wanted = model(input_ids=ids, tree_plan=TREE.plan()).logits
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids, tree_plan=TREE.plan()).logits, wanted)


def test_a_wrapped_model_without_a_tree_is_causal():
    model = wrap(make()).eval()
    ids = tokens(9)
    wanted = other(model.base_model.model)(ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, wanted)
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    got = model.generate(input_ids=ids, **options)
    assert torch.equal(got, other(model.base_model.model).generate(ids, **options))


def test_a_wrapped_model_with_another_attention_is_refused():
    model = wrap(make(implementation="sdpa"))
    with pytest.raises(treeattn.InvalidArgument, match="'sdpa'"):
        model(input_ids=tokens(TREE.tokens), tree_plan=TREE.plan())


@pytest.mark.parametrize("form", ["plan", "arrays"])
@pytest.mark.parametrize(
    ("kind", "raised", "text"),
    [
        ("PromptTuningConfig", treeattn.InvalidArgument, "20 query tokens.*1 x 23.*prompt tuning"),
        ("PrefixTuningConfig", treeattn.Unsupported, "23 keys and 20 queries.*prefix tuning"),
    ],
)
def test_virtual_tokens_are_refused(kind, raised, text, form):
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(make(), config)
    with pytest.raises(raised, match=text):
        model(input_ids=tokens(TREE.tokens), **how_to_give(form))
