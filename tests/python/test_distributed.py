"""Two ranks over gloo with the CPU executor: DDP and FSDP2 give one rank's gradients."""

import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch.distributed as dist  # noqa: E402

import treeattn  # noqa: E402

try:
    treeattn._native.load()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

from tiny_models import (  # noqa: E402
    NODES, SECOND, Tree, gradients, make, packed_loss, row_weights, tokens,
)  # fmt: skip

RANKS = 2
TREES = [Tree(NODES), Tree(SECOND)]
MODES = ["ddp", "ddp_checkpointing", "fsdp2", "fsdp2_checkpointing", "fsdp2_compiled_layers"]


def backward(model, rank, form):
    tree = TREES[rank]
    given = {"tree_plan": tree.plan()} if form == "plan" else tree.arrays()
    logits = model(
        tokens(tree.tokens, seed=rank), position_ids=tree.positions(), use_cache=False, **given
    ).logits[0]
    packed_loss(logits, tree, row_weights(tree, seed=rank)).backward()


def wrapped(mode):
    model = make().train()
    if mode.endswith("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if mode.startswith("ddp"):
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        if mode.endswith("compiled_layers"):
            layer.compile(backend="aot_eager")
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole_gradients(model):
    """Gradients by the names of the bare model, gathered where they are sharded."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        found[name.removeprefix("module.").replace("_orig_mod.", "")] = grad.detach().clone()
    return found


def form_of(mode):
    return "arrays" if mode.endswith("checkpointing") else "plan"


def work(rank, folder):
    torch.set_num_threads(1)
    treeattn.register()
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    try:
        for mode in MODES:
            model = wrapped(mode)
            backward(model, rank, form_of(mode))
            found = whole_gradients(model)
            if rank == 0:
                torch.save(found, f"{folder}/{mode}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def one_rank():
    treeattn.register()
    model = make()
    for rank in range(RANKS):
        backward(model, rank, "plan")
    return {name: grad / RANKS for name, grad in gradients(model).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the ranks, started once for all tests, leave their gradients."""
    if not dist.is_available():
        pytest.skip("torch was built without distributed")
    folder = str(tmp_path_factory.mktemp("ranks"))
    with pytest.MonkeyPatch.context() as patch:
        # The ranks import this file by its name.
        here = os.path.dirname(os.path.abspath(__file__))
        patch.setenv("PYTHONPATH", here, prepend=os.pathsep)
        torch.multiprocessing.spawn(work, (folder,), nprocs=RANKS, join=True)
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_give_the_gradients_of_one(mode, folder):
    got, wanted = torch.load(f"{folder}/{mode}.pt"), one_rank()
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], msg=lambda m: f"{name}: {m}")
