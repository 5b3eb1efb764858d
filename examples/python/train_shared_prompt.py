#!/usr/bin/env python3
"""Trains a small Llama on several sampled answers to each prompt, packed into trees and unshared.

The batches have GRPO's shape: each prompt has a group of answers, answers have advantages, and the
clipped policy-gradient loss is taken over every row's answer tokens. Both runs start from the same
weights and see the same rows; both are cut into micro-batches of the same number of tokens.

  packed    treeattn.pack: each prompt is computed once, its answers are branches
  unshared  --baseline varlen: every row behind its own copy of the prompt, without padding, through
            the same causal varlen kernels; --baseline sdpa: PyTorch's attention on padded rows

Rewards are random numbers: what is shown is equal losses at a lower cost, not learning.

    python examples/python/train_shared_prompt.py                       # on a GPU
    python examples/python/train_shared_prompt.py --device cpu --tiny   # anywhere
"""

import argparse
import json
import statistics
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import treeattn

CLIP = 0.2
SIZES = {
    # prompts, answers per prompt, tokens of a prompt and of an answer (shortest, longest)
    "full": dict(prompts=8, answers=8, prompt=(2048, 2048), answer=(256, 768), max_tokens=24576),
    "tiny": dict(prompts=2, answers=4, prompt=(12, 20), answer=(3, 8), max_tokens=100),
}
MODELS = {
    "full": dict(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=8,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128,
    ),
    "tiny": dict(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    ),
}  # fmt: skip


def make_batch(generator, vocabulary, prompts, answers, prompt, answer, **_):
    """Rows (prompt and answer), prompt lengths and advantages of one training step."""

    def tokens(shortest, longest):
        length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        return torch.randint(vocabulary, (length,), generator=generator)

    rows, lengths = [], []
    for _ in range(prompts):
        head = tokens(*prompt)
        rows += [torch.cat([head, tokens(*answer)]) for _ in range(answers)]
        lengths += [len(head)] * answers
    rewards = torch.rand(prompts, answers, generator=generator)
    advantages = (rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-4)
    return rows, torch.tensor(lengths), advantages.flatten()


class Packed:
    """Micro-batches of packed rows. share=False: each row is a tree of its own."""

    def __init__(self, rows, max_tokens, device, share=True):
        batch = treeattn.pack(rows, device=device, share=share)
        self.report = batch.report()
        self.parts = batch.partition(max_tokens)
        self.tokens = sum(part.num_tokens for part in self.parts)

    def log_probs(self, model, part):
        """log p of every token of the part's rows, row after row."""
        logits = model(**part.model_inputs()).logits
        return part.token_log_probs(logits)[part.row_positions]


class Padded:
    """Micro-batches of rows padded on the right to the longest, for attention without packing."""

    class Part:
        def __init__(self, rows, row_ids, device):
            self.row_ids = row_ids
            chosen = [rows[r] for r in row_ids]
            self.input_ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True).to(device)
            lengths = torch.tensor([len(row) for row in chosen])
            self.mask = (torch.arange(self.input_ids.shape[1]) < lengths[:, None]).to(device)

    def __init__(self, rows, max_tokens, device):
        step = max(1, max_tokens // max(len(row) for row in rows))
        numbers = range(len(rows))
        self.parts = [
            self.Part(rows, list(numbers[at : at + step]), device) for at in numbers[::step]
        ]
        self.tokens = sum(part.input_ids.numel() for part in self.parts)

    def log_probs(self, model, part):
        logits = model(input_ids=part.input_ids, attention_mask=part.mask, use_cache=False).logits
        ids = part.input_ids[:, 1:]
        log_probs = -torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), ids.flatten(), reduction="none"
        )
        return torch.nn.functional.pad(log_probs.view(ids.shape), (1, 0))[part.mask]


def grpo_loss(log_probs, old, rows, row_ids, prompt_lengths, advantages, device):
    """Two sums over these rows: the mean clipped policy-gradient loss of the answer's tokens, and
    their mean -log p."""
    lengths = torch.tensor([len(rows[r]) for r in row_ids])
    row = torch.repeat_interleave(torch.arange(len(row_ids)), lengths)
    depth = torch.cat([torch.arange(n) for n in lengths.tolist()])
    prompts = prompt_lengths[row_ids]
    weight = (depth >= prompts[row]) / (lengths - prompts)[row]
    advantage = advantages[row_ids][row].to(device)
    ratio = (log_probs - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    weight = weight.to(device)
    return -(gain * weight).sum(), -(log_probs.detach() * weight).sum()


def train(kind, options, device, dtype):
    """Loss and mean answer -log p of every update, seconds and computed tokens of every step."""
    size = "tiny" if options.tiny else "full"
    sizes = SIZES[size]
    torch.manual_seed(0)
    attention = "sdpa" if kind == "sdpa" else "tree_attn"
    config = LlamaConfig(**MODELS[size], attn_implementation=attention)
    with device:
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(1)
    max_tokens = options.max_tokens or sizes["max_tokens"]
    losses, nlls, seconds, tokens, report = [], [], [], [], None
    for _ in range(options.steps):
        rows, prompt_lengths, advantages = make_batch(generator, config.vocab_size, **sizes)
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        if kind == "sdpa":
            batch = Padded(rows, max_tokens, device)
        else:
            batch = Packed(rows, max_tokens, device, share=kind == "packed")
            report = batch.report
        cast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        with torch.no_grad(), cast:
            old = [batch.log_probs(model, part) for part in batch.parts]
        for _ in range(options.epochs):
            total = torch.zeros(2, device=device)
            for part, before in zip(batch.parts, old):
                with cast:
                    log_probs = batch.log_probs(model, part)
                loss, nll = grpo_loss(
                    log_probs, before, rows, part.row_ids, prompt_lengths, advantages, device
                )
                (loss / len(rows)).backward()
                total += torch.stack([loss.detach(), nll]) / len(rows)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            for kept, value in zip((losses, nlls), total.tolist()):
                kept.append(value)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        tokens.append(batch.tokens)
    return {"losses": losses, "nlls": nlls, "seconds": seconds, "tokens": tokens}, report


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    parser.add_argument("--tiny", action="store_true", help="sizes for a machine without a GPU")
    parser.add_argument("--steps", type=int, default=5, help="the first one is not timed")
    parser.add_argument("--epochs", type=int, default=2, help="updates per step")
    parser.add_argument("--max-tokens", type=int, help="tokens of a micro-batch")
    parser.add_argument("--baseline", choices=["varlen", "sdpa"], default="varlen")
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"--steps is {options.steps}, expected at least 2: the first is not timed")
    device = torch.device(options.device)
    # Full precision on the CPU, so that losses agree to the last digits.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if options.tiny:
        torch.set_num_threads(1)  # waiting for each other would take longer than the work
    treeattn.register()
    packed, report = train("packed", options, device, dtype)
    unshared, _ = train(options.baseline, options, device, dtype)
    differences = [
        abs(a - b) for name in ("losses", "nlls") for a, b in zip(packed[name], unshared[name])
    ]
    medians = [statistics.median(run["seconds"][1:]) for run in (packed, unshared)]
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    equal = max(differences) <= tolerance
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "baseline": options.baseline,
        "packed": packed,
        "unshared": unshared,
        "largest_difference": max(differences),
        "tolerance": tolerance,
        "losses_agree": equal,
        "packed_ms": medians[0] * 1e3,
        "unshared_ms": medians[1] * 1e3,
        "speedup": medians[1] / medians[0],
        "estimated_speedup": report.estimated_speedup,
    }
    if options.json:
        print(json.dumps(result))
    else:
        print(f"{result['device']}, {result['dtype']}; the last step's rows:\n{report}\n")
        print(f"{'':6} {'loss':^23}  {'mean -log p of answers':^23}")
        print(f"{'update':6}" + f" {'packed':>11} {'unshared':>11} " * 2)
        columns = (run[name] for name in ("losses", "nlls") for run in (packed, unshared))
        for n, values in enumerate(zip(*columns)):
            print("{:6} {:11.6f} {:11.6f}  {:11.6f} {:11.6f}".format(n, *values))
        print(f"largest difference {max(differences):.1e}")
        print(f"\n{'':20} {'tokens':>8} {'ms per step':>12}")
        names = ("packed", f"unshared ({options.baseline})")
        for name, run, ms in zip(names, (packed, unshared), medians):
            print(f"{name:20} {run['tokens'][-1]:8} {1e3 * ms:12.1f}")
        print(f"speed-up {result['speedup']:.2f}x")
    if not equal:
        print(
            f"the runs differ by {max(differences):.1e}, expected at most {tolerance:.0e}",
            file=sys.stderr,
        )
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
