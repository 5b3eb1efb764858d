#!/usr/bin/env python3
"""Times treeattn beside PyTorch's attention on one GPU, in one run, and writes a table and a plot.

Contenders: treeattn (by `treeattn bench --json`), torch SDPA with its FlashAttention-2 and cuDNN
backends on chains, FlexAttention with a compiled block mask on trees. All compute with random normal
inputs in bf16. Useful TFLOP/s count only the pairs that the tree allows.

    bench/peers.py --treeattn build/bin/treeattn --out docs/measurements/2026-11-h200
"""

import argparse
import json
import contextlib
import pathlib
import signal
import subprocess
import sys
import time

CHAINS = {64: "chain:16384", 128: "chain:16384", 256: "chain:8192"}
TREES = [
    "fork:4096,16x1024",
    "fork:4001,16x1013",
    "fork:1024,16x2048",
    "binary:6,512",
    "binary:6,500",
    "binary:9,64",
    "binary:9,61",
    "fork:128,4x4096",
    "fork:2048,1024x12",
]


def parse_tree(spec):
    """Nodes {parent, tokens} of a chain, fork or binary workload, in depth-first order."""
    kind, _, rest = spec.partition(":")
    if kind == "chain":
        return [(-1, int(rest))]
    if kind == "fork":
        prompt, _, responses = rest.partition(",")
        count, _, length = responses.partition("x")
        return [(-1, int(prompt))] + [(0, int(length))] * int(count)
    if kind == "binary":
        depth, _, length = rest.partition(",")
        nodes = []

        def grow(parent, level):
            nodes.append((parent, int(length)))
            me = len(nodes) - 1
            if level > 1:
                grow(me, level - 1)
                grow(me, level - 1)

        grow(-1, int(depth))
        return nodes
    raise ValueError(f"workload {spec!r}: expected chain:N, fork:P,RxL or binary:D,S")


def tree_arrays(nodes):
    """tree_dfs_order_start_q and tree_dfs_order_end_k of every token."""
    last = list(range(len(nodes)))
    for i in range(len(nodes) - 1, 0, -1):
        parent = nodes[i][0]
        if parent >= 0:
            last[parent] = max(last[parent], last[i])
    start, end = [], []
    for i, (_, tokens) in enumerate(nodes):
        start += [i] * tokens
        end += [last[i]] * tokens
    return start, end


def visible_pairs(nodes):
    """(query, key) pairs: every token sees its ancestors' tokens and its own node up to itself."""
    above, pairs = [], 0
    for parent, tokens in nodes:
        context = 0 if parent < 0 else above[parent] + nodes[parent][1]
        above.append(context)
        pairs += tokens * context + tokens * (tokens + 1) // 2
    return pairs


def heads_of(workload, head_dim):
    if workload.startswith("chain:"):
        return {64: (32, 32), 128: (16, 16), 256: (8, 8)}[head_dim]
    return (32, 8)


def useful_flops(workload, head_dim, backward):
    heads, _ = heads_of(workload, head_dim)
    return (10 if backward else 4) * heads * head_dim * visible_pairs(parse_tree(workload))


def median_ms(torch, call, budget_s):
    """Median of calls timed with events; as many calls as fit the budget, 5 to 100."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    reps = int(min(100, max(5, budget_s / max(time.perf_counter() - begin, 1e-5))))
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(reps)]
    for before, after in pairs:
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return sorted(before.elapsed_time(after) for before, after in pairs)[reps // 2]


def inputs(torch, workload, head_dim):
    tokens = sum(length for _, length in parse_tree(workload))
    heads, heads_kv = heads_of(workload, head_dim)

    def draw(count):
        shape = (1, count, tokens, head_dim)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    return draw(heads), draw(heads_kv), draw(heads_kv)


def time_both(torch, attend, q, k, v, budget_s):
    """Milliseconds of forward and backward."""
    forward = median_ms(torch, lambda: attend(q, k, v), budget_s)
    out = attend(q, k, v)
    dout = torch.randn_like(out)
    backward = median_ms(
        torch, lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True), budget_s
    )
    return {"fwd": forward, "bwd": backward}


def run_sdpa(torch, backend, workload, head_dim, budget_s):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = inputs(torch, workload, head_dim)
    with sdpa_kernel(getattr(SDPBackend, backend)):
        return time_both(
            torch,
            lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True
            ),
            q,
            k,
            v,
            budget_s,
        )


def run_flex(torch, workload, head_dim, budget_s):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    start, end = (torch.tensor(a, device="cuda") for a in tree_arrays(parse_tree(workload)))

    def allowed(batch, head, row, key):
        return (key <= row) & (start[row] <= end[key])

    tokens = len(start)
    mask = torch.compile(create_block_mask)(allowed, None, None, tokens, tokens, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = inputs(torch, workload, head_dim)
    return time_both(
        torch,
        lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True),
        q,
        k,
        v,
        budget_s,
    )


def run_treeattn(binary, workload, head_dim):
    heads, heads_kv = heads_of(workload, head_dim)
    command = [binary, "bench", "--json", "--reps", "30", "--pass", "fwd,bwd"]
    command += ["--head-dim", str(head_dim)]
    command += ["--heads", str(heads), "--heads-kv", str(heads_kv), workload]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


@contextlib.contextmanager
def time_limit(seconds):
    """Raises TimeoutError: compiling a mask can take longer than everything else."""

    def stop(*_):
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Run:
    def __init__(self, out):
        self.out = pathlib.Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.records = []

    def add(self, contender, workload, head_dim, which, ms=None, error=None, **more):
        record = {
            "contender": contender,
            "workload": workload,
            "head_dim": head_dim,
            "pass": which,
            **more,
        }
        if error is not None:
            record["error"] = error
        else:
            record["ms"] = ms
            flops = useful_flops(workload, head_dim, which == "bwd")
            record["useful_tflops"] = flops / ms / 1e9
        self.records.append(record)
        text = error or f"{ms:9.3f} ms {record['useful_tflops']:7.1f} TFLOP/s"
        print(f"{contender:16s} d{head_dim:<4d} {workload:20s} {which} {text}", flush=True)

    def add_times(self, contender, workload, head_dim, call):
        try:
            for which, ms in call().items():
                self.add(contender, workload, head_dim, which, ms)
        except Exception as error:  # a peer that fails is a fact, not the end
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            for which in ("fwd", "bwd"):
                self.add(contender, workload, head_dim, which, error=text)

    def rate(self, contender, workload, head_dim, which):
        for r in self.records:
            if (r["contender"], r["workload"], r["head_dim"], r["pass"]) == (
                contender,
                workload,
                head_dim,
                which,
            ):
                return r.get("useful_tflops")
        return None

    def write(self, facts):
        with open(self.out / "peers.jsonl", "w", encoding="utf-8") as file:
            for record in self.records:
                file.write(json.dumps({**facts, **record}) + "\n")
        (self.out / "peers.md").write_text(self.table(facts), encoding="utf-8")

    def table(self, facts):
        contenders = list(dict.fromkeys(r["contender"] for r in self.records))
        rows = list(dict.fromkeys((r["head_dim"], r["workload"], r["pass"]) for r in self.records))
        lines = [f"{facts['device']}, driver {facts['driver']}, torch {facts['torch']}, "]
        lines[0] += f"{facts['date']}; treeattn templates {facts['templates_sha256'][:12]}. "
        lines[0] += "bf16, useful TFLOP/s; in brackets multiples of torch's FA2 on the chain of the"
        lines[0] += " same head dim and pass."
        lines += ["", "| head dim | workload | pass | " + " | ".join(contenders) + " |"]
        lines.append("|" + "---|" * (3 + len(contenders)))
        for head_dim, workload, which in rows:
            base = self.rate("torch FA2", CHAINS[head_dim], head_dim, which)
            cells = []
            for contender in contenders:
                rate = self.rate(contender, workload, head_dim, which)
                if rate is None:
                    cells.append("-")
                elif base:
                    cells.append(f"{rate:.1f} ({rate / base:.2f})")
                else:
                    cells.append(f"{rate:.1f}")
            lines.append(f"| {head_dim} | {workload} | {which} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def plot(self):
        try:
            import matplotlib

            matplotlib.use("Agg")
            from matplotlib import pyplot
        except ImportError:
            print("no plot: matplotlib is not installed", file=sys.stderr)
            return
        figure, axes = pyplot.subplots(2, 1, figsize=(12, 9), sharex=True)
        workloads = list(dict.fromkeys(r["workload"] for r in self.records if r["head_dim"] == 128))
        contenders = list(dict.fromkeys(r["contender"] for r in self.records))
        width = 0.8 / max(1, len(contenders))
        for axis, which in zip(axes, ("fwd", "bwd")):
            for n, contender in enumerate(contenders):
                rates = [self.rate(contender, w, 128, which) or 0 for w in workloads]
                places = [i + n * width for i in range(len(workloads))]
                axis.bar(places, rates, width, label=contender)
            axis.set_ylabel(f"{which}, useful TFLOP/s")
        axes[0].legend()
        axes[1].set_xticks([i + 0.4 - width / 2 for i in range(len(workloads))])
        axes[1].set_xticklabels(workloads, rotation=30, ha="right")
        figure.tight_layout()
        figure.savefig(self.out / "peers.png", dpi=110)


def driver_version():
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--treeattn", required=True, help="the treeattn command line")
    parser.add_argument("--out", required=True, help="folder for peers.jsonl, peers.md, peers.png")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds a measurement")
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out")
    parser.add_argument(
        "--flex-for", type=float, default=45, help="most seconds of FlexAttention a workload"
    )
    options = parser.parse_args()
    try:
        import torch
    except ImportError:
        sys.exit("bench/peers.py needs torch with CUDA: pip install torch")
    if not torch.cuda.is_available():
        sys.exit("bench/peers.py needs a GPU: torch finds none")
    torch.manual_seed(1)

    run = Run(options.out)
    ours = []
    facts = {
        "device": torch.cuda.get_device_name(0),
        "driver": driver_version(),
        "torch": torch.__version__,
    }

    def save():
        """After every step, so that what is measured is kept whatever happens next."""
        facts.update(date=ours[0]["date"], templates_sha256=ours[0]["templates_sha256"])
        run.write(facts)
        lines = (json.dumps(line) + "\n" for line in ours)
        (run.out / "treeattn.jsonl").write_text("".join(lines), encoding="utf-8")

    cases = [(workload, head_dim) for head_dim, workload in CHAINS.items()]
    cases += [(workload, 128) for workload in TREES]
    for workload, head_dim in cases:
        for line in run_treeattn(options.treeattn, workload, head_dim):
            ours.append(line)
            run.add("treeattn", workload, head_dim, line["pass"], line["attention_ms"]["median"])
        if workload.startswith("chain:"):
            for name, backend in (("torch FA2", "FLASH_ATTENTION"), ("torch cuDNN", "CUDNN_ATTENTION")):
                run.add_times(
                    name,
                    workload,
                    head_dim,
                    lambda: run_sdpa(torch, backend, workload, head_dim, options.budget),
                )
        save()
    for workload in [] if options.no_flex else [CHAINS[128]] + TREES:

        def flex():
            with time_limit(options.flex_for):
                return run_flex(torch, workload, 128, options.budget)

        run.add_times("FlexAttention", workload, 128, flex)
        save()
    run.plot()
    print(run.table(facts))


if __name__ == "__main__":
    main()
