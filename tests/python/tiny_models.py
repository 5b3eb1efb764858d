"""Tiny randomly initialised transformers models and trees, for tests."""

import copy

import torch
import transformers

VOCABULARY = 64
_SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
)
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {"num_key_value_heads": 1}),
}

# One prompt, two answers, the first of which goes on in two ways; then a second tree of two rows.
# Each node is (parent, tokens).
NODES = [(-1, 5), (0, 3), (1, 2), (1, 4), (0, 6)]
SECOND = [(-1, 4), (0, 1), (0, 3)]


class Tree:
    """A tree in depth-first order.

    start, end, depths: one number per packed token; rows: packed positions of each leaf's row.
    """

    def __init__(self, nodes):
        self.start, self.end, self.depths, spans = [], [], [], []
        last = list(range(len(nodes)))
        for index in reversed(range(len(nodes))):
            parent = nodes[index][0]
            if parent >= 0:
                last[parent] = max(last[parent], last[index])
        above = []
        for index, (parent, tokens) in enumerate(nodes):
            depth = 0 if parent < 0 else above[parent]
            spans.append(range(len(self.start), len(self.start) + tokens))
            above.append(depth + tokens)
            self.depths += range(depth, depth + tokens)
            self.start += [index] * tokens
            self.end += [last[index]] * tokens
        self.tokens = len(self.start)
        parents = {parent for parent, _ in nodes}
        self.rows = []
        for leaf in range(len(nodes)):
            if leaf in parents:
                continue
            row, node = [], leaf
            while node >= 0:
                row = [*spans[node], *row]
                node = nodes[node][0]
            self.rows.append(row)

    def arrays(self, device="cpu"):
        return {
            "tree_dfs_order_start_q": torch.tensor(self.start, dtype=torch.int32, device=device),
            "tree_dfs_order_end_k": torch.tensor(self.end, dtype=torch.int32, device=device),
        }

    def positions(self, device="cpu"):
        return torch.tensor([self.depths], device=device)

    def plan(self, device="cpu"):
        import treeattn

        cu = torch.tensor([0, self.tokens], dtype=torch.int32, device=device)
        return treeattn.plan(cu, **self.arrays(device))


def make(family="llama", device="cpu", dtype=torch.float32, implementation="tree_attn", **changes):
    config_name, model_name, own = FAMILIES[family]
    config = getattr(transformers, config_name)(**{**_SIZES, **own, **changes})
    config._attn_implementation = implementation
    torch.manual_seed(0)
    return getattr(transformers, model_name)(config).to(device, dtype).eval()


def other(model, implementation="sdpa", dtype=None):
    """The same model with another attention."""
    copied = copy.deepcopy(model)
    copied.zero_grad()
    copied.set_attn_implementation(implementation)
    return copied if dtype is None else copied.to(dtype)


def tokens(count, device="cpu", seed=1, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, count), generator=generator).to(device)


def row_weights(tree, seed=2):
    """What each logit of each row weighs in the loss of the tests."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((len(row), VOCABULARY), generator=generator) for row in tree.rows]


def packed_loss(logits, tree, weights):
    """The sum over the rows, from packed logits [tokens, vocabulary]."""
    return sum(
        (logits[row].float() * weight.to(logits.device)).sum()
        for row, weight in zip(tree.rows, weights)
    )


def rows_loss(model, ids, tree, weights):
    """The same from the unshared rows, and their logits."""
    total, all_logits = 0.0, []
    for row, weight in zip(tree.rows, weights):
        logits = model(ids[:, row], use_cache=False).logits[0]
        total = total + (logits.float() * weight.to(logits.device)).sum()
        all_logits.append(logits)
    return total, all_logits


def gradients(model):
    return {name: p.grad.detach().float().clone() for name, p in model.named_parameters()}
