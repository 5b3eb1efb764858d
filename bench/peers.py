#!/usr/bin/env python3
"""Times treeattn beside PyTorch's attention on one GPU, in one run, and writes a table and a plot.

Contenders:
  treeattn  `treeattn bench --json`, once for every choice in --families
  fa2       torch SDPA, FlashAttention-2 backend, on chains (rows that share nothing)
  cudnn     torch SDPA, cuDNN backend, on chains
  flex      FlexAttention with a compiled block mask, on chains and trees

All compute with random normal inputs in bf16, forward and backward. Useful TFLOP/s count only the
pairs that the tree allows. PyTorch runs in a process of its own, which is ended and started again
when a measurement takes longer than its limit, so that one that hangs costs nothing but its time.
Every figure is appended to peers.jsonl as soon as it is known: a run that is cut keeps what it
measured, and a later run with the same --out adds to it (--report: only writes the table anew).

    bench/peers.py --treeattn build/bin/treeattn --out docs/measurements/2026-11-h200
    bench/peers.py --out docs/measurements/2026-11-h200 --only flex --workloads binary:9,64
"""

import argparse
import collections
import datetime
import json
import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import tempfile
import time

CONTENDERS = ("treeattn", "fa2", "cudnn", "flex")
LABELS = {"fa2": "torch FA2", "cudnn": "torch cuDNN", "flex": "FlexAttention"}

Case = collections.namedtuple("Case", "workload heads heads_kv head_dim")
# The yardsticks: what figures of their head dim are quoted as multiples of.
CHAINS = [
    Case("chain:16384", 32, 32, 64),
    Case("chain:16384", 16, 16, 128),
    Case("chain:8192", 8, 8, 256),
]
TREES = [
    Case(workload, 32, 8, 128)
    for workload in (
        "fork:4096,16x1024",
        "fork:4001,16x1013",
        "fork:1024,16x2048",
        "binary:6,512",
        "binary:6,500",
        "binary:9,64",
        "binary:9,61",
        "fork:128,4x4096",
        "fork:2048,1024x12",
    )
]
# Launch-bound ones, the last beside what it costs without sharing.
SMALL = [
    Case(workload, 64, 8, 128)
    for workload in ("chain:1024", "chain:2048", "fork:256,4x128", "4*chain:384")
]
CASES = CHAINS + TREES + SMALL


def parse_workload(spec):
    """(copies, nodes): nodes are (parent, tokens) of one tree in depth-first order."""
    match = re.fullmatch(r"(?:(\d+)\*)?(chain|fork|binary):([0-9,x]+)", spec)
    expected = f"workload {spec!r}: expected chain:N, fork:P,RxL, binary:D,S or K copies as K*SPEC"
    if not match:
        raise ValueError(expected)
    copies, kind, numbers = int(match[1] or 1), match[2], match[3]
    if kind == "chain" and re.fullmatch(r"\d+", numbers):
        return copies, [(-1, int(numbers))]
    if kind == "fork" and re.fullmatch(r"\d+,\d+x\d+", numbers):
        prompt, count, length = (int(number) for number in re.split("[,x]", numbers))
        return copies, [(-1, prompt)] + [(0, length)] * count
    if kind == "binary" and re.fullmatch(r"\d+,\d+", numbers):
        depth, length = (int(number) for number in numbers.split(","))
        nodes = []

        def grow(parent, level):
            nodes.append((parent, length))
            me = len(nodes) - 1
            if level > 1:
                grow(me, level - 1)
                grow(me, level - 1)

        grow(-1, depth)
        return copies, nodes
    raise ValueError(expected)


def is_chain(workload):
    return len(parse_workload(workload)[1]) == 1


def tree_arrays(nodes):
    """tree_dfs_order_start_q and tree_dfs_order_end_k of every token of one tree."""
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


def visible_pairs(workload):
    """(query, key) pairs: every token sees its ancestors' tokens and its own node up to itself."""
    copies, nodes = parse_workload(workload)
    above, pairs = [], 0
    for parent, tokens in nodes:
        context = 0 if parent < 0 else above[parent] + nodes[parent][1]
        above.append(context)
        pairs += tokens * context + tokens * (tokens + 1) // 2
    return copies * pairs


def useful_flops(case, which):
    per_pair = 10 if which == "bwd" else 4
    return per_pair * case.heads * case.head_dim * visible_pairs(case.workload)


def usual_case(workload, head_dim=128):
    """The case that a workload stands for: a listed one, else 32 query heads on 8."""
    for case in CASES:
        if case.workload == workload and case.head_dim == head_dim:
            return case
    parse_workload(workload)
    return Case(workload, 32, 8, head_dim)


# The process that PyTorch runs in: one task a line on standard input, records on standard output.


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


def draw_inputs(torch, case, heads_kv):
    copies, nodes = parse_workload(case.workload)
    tokens = sum(length for _, length in nodes)

    def draw(count):
        shape = (copies, count, tokens, case.head_dim)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    return draw(case.heads), draw(heads_kv), draw(heads_kv)


def time_passes(torch, attend, tensors, budget_s, emit):
    """Emits milliseconds of forward, then of backward, each as soon as it is known."""
    begin = time.perf_counter()
    out = attend(*tensors)
    torch.cuda.synchronize()
    first_s = time.perf_counter() - begin
    del out
    # As in training: what backward needs is kept.
    emit("fwd", median_ms(torch, lambda: attend(*tensors), budget_s), first_s)
    out = attend(*tensors)
    dout = torch.randn_like(out)

    def backward():
        return torch.autograd.grad(out, tensors, dout, retain_graph=True)

    begin = time.perf_counter()
    backward()
    torch.cuda.synchronize()
    first_s = time.perf_counter() - begin
    emit("bwd", median_ms(torch, backward, budget_s), first_s)


def run_sdpa(torch, backend, case, budget_s, emit):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    attention = torch.nn.functional.scaled_dot_product_attention
    grouped = case.heads != case.heads_kv
    with sdpa_kernel(getattr(SDPBackend, backend)):
        tensors = draw_inputs(torch, case, case.heads_kv)
        note = {}
        if grouped:
            try:
                attention(*tensors, is_causal=True, enable_gqa=True)
            except (RuntimeError, TypeError):  # this backend or version knows no groups
                grouped = False
                note = {"note": "keys and values repeated for every query head"}
                tensors = draw_inputs(torch, case, case.heads)
        more = {"enable_gqa": True} if grouped else {}
        time_passes(
            torch,
            lambda q, k, v: attention(q, k, v, is_causal=True, **more),
            tensors,
            budget_s,
            lambda which, ms, first_s: emit(which, ms, first_call_s=first_s, **note),
        )


class Flex:
    """FlexAttention as it is meant to be used: one compiled function for all calls."""

    def __init__(self, torch):
        from torch.nn.attention import flex_attention

        # Every workload is another static shape. Beyond the usual limit of 8 the compiler gives up
        # and runs the uncompiled function, which writes out all scores.
        for name in ("recompile_limit", "cache_size_limit"):
            if hasattr(torch._dynamo.config, name):
                setattr(torch._dynamo.config, name, 256)
        self.torch = torch
        self.attention = torch.compile(flex_attention.flex_attention, dynamic=False)
        self.create_mask_eagerly = flex_attention.create_block_mask
        self.create_mask = torch.compile(self.create_mask_eagerly, dynamic=False)

    def run(self, case, budget_s, emit):
        torch = self.torch
        copies, nodes = parse_workload(case.workload)
        start, end = (
            torch.tensor(array, device="cuda", dtype=torch.int32) for array in tree_arrays(nodes)
        )

        def allowed(batch, head, row, key):
            return (key <= row) & (start[row] <= end[key])

        tokens = len(start)
        begin = time.perf_counter()
        # All copies have the same tree: one mask serves the batch.
        note = {}
        try:
            mask = self.create_mask(allowed, None, None, tokens, tokens, device="cuda")
        except Exception as error:  # it makes the same mask uncompiled, from all pairs
            note = {"note": f"mask made uncompiled after {type(error).__name__}"}
            mask = self.create_mask_eagerly(allowed, None, None, tokens, tokens, device="cuda")
        torch.cuda.synchronize()
        note["mask_s"] = time.perf_counter() - begin
        more = {"enable_gqa": True} if case.heads != case.heads_kv else {}
        time_passes(
            torch,
            lambda q, k, v: self.attention(q, k, v, block_mask=mask, **more),
            draw_inputs(torch, case, case.heads_kv),
            budget_s,
            lambda which, ms, first_s: emit(which, ms, first_call_s=first_s, **note),
        )


def serve():
    """Runs the tasks of standard input until it closes."""
    # Whatever a compiler prints must not end up among the records.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(record):
        out.write(json.dumps(record) + "\n")
        out.flush()

    try:
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("torch finds no GPU")
    except Exception as error:
        send({"fatal": f"{type(error).__name__}: {error}"})
        return
    torch.manual_seed(1)
    send({"device": torch.cuda.get_device_name(0), "torch": torch.__version__})
    flex = None
    for line in sys.stdin:
        task = json.loads(line)
        case = Case(*task["case"])

        def emit(which, ms, **more):
            send({"pass": which, "ms": ms, **more})

        try:
            if task["contender"] == "flex":
                flex = flex or Flex(torch)
                flex.run(case, task["budget"], emit)
            else:
                backend = {"fa2": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION"}[task["contender"]]
                run_sdpa(torch, backend, case, task["budget"], emit)
        except Exception as error:  # a peer that fails is a fact, not the end
            send({"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]})
        try:
            torch.cuda.empty_cache()
        finally:
            send({"done": True})


# The process that drives them.


class Child:
    """A process whose standard output is read line by line, with a deadline."""

    def __init__(self, command, env=None, stderr=None):
        # A session of its own, so that compilers it started end with it.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=env,
            start_new_session=True,
        )
        self.rest = b""

    def write(self, record):
        self.process.stdin.write((json.dumps(record) + "\n").encode())
        self.process.stdin.flush()

    def line(self, deadline):
        """The next line as JSON; None at the end. Raises TimeoutError."""
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self.rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise TimeoutError
            more = os.read(descriptor, 1 << 16)
            if not more:
                return None
            self.rest += more
        line, _, self.rest = self.rest.partition(b"\n")
        return json.loads(line)

    def end(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            try:
                stream.close()
            except BrokenPipeError:
                pass


class Torch:
    """PyTorch's process, started when first needed and again after it was ended."""

    def __init__(self, limit_s):
        self.limit_s = limit_s
        self.child = None
        self.facts = {}
        self.broken = None

    def measure(self, contender, case, budget_s, limit_s, emit):
        """Passes records to `emit`; the reason why some are missing, or None."""
        if self.broken:
            return self.broken
        try:
            if self.child is None:
                self.start()
            self.child.write({"contender": contender, "case": case, "budget": budget_s})
            deadline = time.monotonic() + limit_s
            problem, spoilt = None, False
            while True:
                record = self.child.line(deadline)
                if record is None:
                    raise OSError("the process ended")
                if "done" in record:
                    if spoilt:
                        self.stop()
                    return problem
                if "error" in record:
                    problem = record["error"]
                    spoilt = "CUDA error" in problem  # every later call would fail with it
                else:
                    emit(record)
        except TimeoutError:
            self.stop()
            return f"stopped after {limit_s:.0f} s"
        except (OSError, ValueError) as error:
            self.stop()
            return self.broken or f"{type(error).__name__}: {error}"

    def start(self):
        self.child = Child([sys.executable, os.path.abspath(__file__), "--serve"])
        try:
            hello = self.child.line(time.monotonic() + self.limit_s)
        except TimeoutError:
            hello = {"fatal": f"importing torch took more than {self.limit_s:.0f} s"}
        if hello is None or "fatal" in hello:
            self.broken = (hello or {}).get("fatal", "the process ended while torch was imported")
            raise ValueError(self.broken)
        self.facts = hello

    def stop(self):
        if self.child is not None:
            self.child.end()
            self.child = None


def measure_treeattn(binary, family, case, limit_s, emit):
    """Passes the lines of `treeattn bench` to `emit`; the reason why some are missing, or None."""
    command = [binary, "bench", "--json", "--reps", "30", "--pass", "fwd,bwd"]
    command += ["--head-dim", str(case.head_dim), "--heads", str(case.heads)]
    command += ["--heads-kv", str(case.heads_kv), case.workload]
    environment = {**os.environ, "TREEATTN_FAMILY": family}
    with tempfile.TemporaryFile() as stderr:
        try:
            child = Child(command, environment, stderr)
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        deadline = time.monotonic() + limit_s
        try:
            while (line := child.line(deadline)) is not None:
                emit(line)
            status = child.process.wait()
            if status == 0:
                return None
            stderr.seek(0)
            said = stderr.read().decode(errors="replace").split("\n")[0]
            return f"exit status {status}: {said}"
        except TimeoutError:
            return f"stopped after {limit_s:.0f} s"
        except ValueError as error:
            return f"no JSON: {error}"
        finally:
            child.end()


class Records:
    """peers.jsonl: what was measured, the newest of equals counting."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "peers.jsonl"
        self.all = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # the last line of a run that was cut
                # Of before records carried them; head counts followed from the workload.
                case = usual_case(record["workload"], record["head_dim"])
                record.setdefault("heads", case.heads)
                record.setdefault("heads_kv", case.heads_kv)
                self.all.append(record)

    def append_line(self, name, record):
        with open(self.folder / name, "a+b") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(record).encode() + b"\n")

    def add(self, facts, label, case, which, ms=None, error=None, **more):
        record = {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            **facts,
            "contender": label,
            **case._asdict(),
            "pass": which,
            **more,
        }
        if error is not None:
            record["error"] = error
            text = error
        else:
            record["ms"] = ms
            record["useful_tflops"] = useful_flops(case, which) / ms / 1e9
            text = f"{ms:9.3f} ms {record['useful_tflops']:7.1f} TFLOP/s"
        self.all.append(record)
        self.append_line("peers.jsonl", record)
        heads = f"{case.heads}/{case.heads_kv}"
        print(
            f"{label:16s} d{case.head_dim:<4d} {heads:6s} {case.workload:20s} {which} {text}",
            flush=True,
        )

    def find(self, label, case, which):
        """The newest figure; an error only where there is none."""
        found = None
        for record in self.all:
            same = record["contender"] == label and record["pass"] == which
            if same and Case(*(record[field] for field in Case._fields)) == case:
                if "ms" in record or found is None or "ms" not in found:
                    found = record
        return found

    def labels(self):
        return list(dict.fromkeys(record["contender"] for record in self.all))

    def cases(self):
        measured = [Case(*(record[field] for field in Case._fields)) for record in self.all]
        listed = [case for case in CASES if case in measured]
        return list(dict.fromkeys(listed + measured))

    def table(self):
        labels = self.labels()
        facts = {}
        for record in self.all:
            facts.update({key: record[key] for key in record if key in FACTS})
        dates = sorted({record["date"][:10] for record in self.all if "date" in record})
        text = ", ".join(f"{key} {facts[key]}" for key in FACTS if key in facts)
        lines = [f"{' and '.join(dates)}: {text}. bf16, warm L2, medians: useful TFLOP/s (ms); in"]
        lines[0] += " brackets multiples of torch's FA2 on the long chain of the same head dim."
        lines += ["", "| head dim | heads | workload | pass | " + " | ".join(labels) + " |"]
        lines.append("|" + "---|" * (4 + len(labels)))
        for case in self.cases():
            for which in ("fwd", "bwd"):
                cells = [self.cell(label, case, which) for label in labels]
                heads = f"{case.heads}/{case.heads_kv}"
                row = [str(case.head_dim), heads, case.workload, which, *cells]
                lines.append("| " + " | ".join(row) + " |")
        notes = dict.fromkeys(
            f"{record['contender']}, {record['workload']}: {record['note']}."
            for record in self.all
            if "note" in record
        )
        return "\n".join(lines) + "\n" + "".join(f"\n{note}\n" for note in notes)

    def cell(self, label, case, which):
        record = self.find(label, case, which)
        if record is None:
            return "-"
        if "ms" not in record:
            return "failed"
        text = f"{record['useful_tflops']:.1f} ({record['ms']:.3f})"
        for chain in CHAINS:
            base = self.find("torch FA2", chain, which)
            if chain.head_dim == case.head_dim and base is not None and "ms" in base:
                text += f" [{record['useful_tflops'] / base['useful_tflops']:.2f}]"
        return text

    def write_table(self):
        (self.folder / "peers.md").write_text(self.table(), encoding="utf-8")

    def plot(self):
        try:
            import matplotlib

            matplotlib.use("Agg")
            from matplotlib import pyplot
        except ImportError:
            print("no plot: matplotlib is not installed", file=sys.stderr)
            return
        figure, axes = pyplot.subplots(2, 1, figsize=(14, 9), sharex=True)
        cases = [case for case in self.cases() if case.head_dim == 128]
        labels = self.labels()
        width = 0.8 / max(1, len(labels))
        for axis, which in zip(axes, ("fwd", "bwd")):
            for n, label in enumerate(labels):
                found = [self.find(label, case, which) or {} for case in cases]
                rates = [record.get("useful_tflops", 0) for record in found]
                axis.bar([i + n * width for i in range(len(cases))], rates, width, label=label)
            axis.set_ylabel(f"{which}, useful TFLOP/s, head dim 128")
        axes[0].legend()
        axes[1].set_xticks([i + 0.4 - width / 2 for i in range(len(cases))])
        axes[1].set_xticklabels([case.workload for case in cases], rotation=30, ha="right")
        figure.tight_layout()
        figure.savefig(self.folder / "peers.png", dpi=110)


FACTS = ("device", "driver", "torch", "templates_sha256")


def driver_version():
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def run_all(options, records):
    torch = Torch(options.import_limit)
    facts = {"driver": driver_version()}
    # Contender by contender: FlexAttention, which compiles longest, comes last.
    try:
        for contender in options.only:
            for case in options.cases:
                if contender == "treeattn":
                    for family in options.families:
                        run_treeattn(options, records, facts, family, case)
                elif contender == "flex" or is_chain(case.workload):
                    run_torch(options, records, facts, torch, contender, case)
                records.write_table()
    finally:
        torch.stop()


def run_treeattn(options, records, facts, family, case):
    label = f"treeattn {family}"
    missing = ["fwd", "bwd"]

    def emit(line):
        records.append_line("treeattn.jsonl", line)
        facts["templates_sha256"] = line["templates_sha256"]
        facts.setdefault("device", line["device"].get("name", "unknown"))
        if line["pass"] in missing:
            missing.remove(line["pass"])
        more = {key: line[key] for key in ("spec", "host_us") if key in line}
        more["plan_ms"] = line["plan_ms"]["median"]
        ms = line["attention_ms"]["median"]
        records.add(facts, label, case, line["pass"], ms, **more)

    problem = measure_treeattn(options.treeattn, family, case, options.limit, emit)
    for which in missing if problem else []:
        records.add(facts, label, case, which, error=problem)


def run_torch(options, records, facts, torch, contender, case):
    missing = ["fwd", "bwd"]

    def emit(record):
        known = {**facts, **torch.facts}
        missing.remove(record["pass"])
        records.add(known, LABELS[contender], case, record.pop("pass"), record.pop("ms"), **record)

    limit = options.flex_limit if contender == "flex" else options.limit
    problem = torch.measure(contender, case, options.budget, limit, emit)
    for which in missing if problem else []:
        known = {**facts, **torch.facts}
        records.add(known, LABELS[contender], case, which, error=problem)


def names(known, what):
    def parse(text):
        chosen = text.split(",")
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is no {what}: {', '.join(known)}")
        return [name for name in known if name in chosen]

    return parse


def workload_list(texts):
    """Cases of workloads, each of which may end in @HEADS/HEADS_KV and @HEAD_DIM; all if none."""
    cases = []
    for text in texts:
        workload, *more = text.split("@")
        head_dim, heads = 128, None
        for part in more:
            if re.fullmatch(r"\d+/\d+", part):
                heads = tuple(int(number) for number in part.split("/"))
            elif re.fullmatch(r"\d+", part):
                head_dim = int(part)
            else:
                raise ValueError(f"workload {text!r}: {part!r} is no HEADS/HEADS_KV or head dim")
        case = usual_case(workload, head_dim)
        cases.append(case._replace(heads=heads[0], heads_kv=heads[1]) if heads else case)
    return cases or list(CASES)


def main():
    if sys.argv[1:] == ["--serve"]:
        serve()
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--treeattn", help="the treeattn command line")
    parser.add_argument("--out", required=True, help="folder for peers.jsonl, peers.md, peers.png")
    parser.add_argument(
        "--only",
        type=names(CONTENDERS, "contender"),
        default=list(CONTENDERS),
        metavar="LIST",
        help="these contenders: " + ",".join(CONTENDERS),
    )
    parser.add_argument(
        "--workloads",
        nargs="+",
        default=[],
        metavar="WORKLOAD",
        help="in place of the usual ones: binary:9,64, or chain:4096@64/8@128 with heads, head dim",
    )
    parser.add_argument(
        "--families",
        type=names(("sm80", "auto"), "choice of TREEATTN_FAMILY"),
        default=["sm80", "auto"],
        metavar="LIST",
        help="kernel families of treeattn: sm80, auto (sm90 where it runs) or both, the default",
    )
    parser.add_argument("--budget", type=float, default=0.3, help="seconds a measurement, about")
    parser.add_argument(
        "--limit", type=float, default=60, help="most seconds a workload of treeattn or SDPA"
    )
    parser.add_argument(
        "--flex-limit", type=float, default=90, help="most seconds a workload of FlexAttention"
    )
    parser.add_argument(
        "--import-limit", type=float, default=120, help="most seconds for importing torch"
    )
    parser.add_argument(
        "--report", action="store_true", help="measure nothing: table and plot of what is there"
    )
    options = parser.parse_args()
    try:
        options.cases = workload_list(options.workloads)
    except ValueError as error:
        parser.error(str(error))
    if "treeattn" in options.only and not options.treeattn and not options.report:
        parser.error("--treeattn is missing: the command line to time (or --only fa2,cudnn,flex)")
    records = Records(options.out)
    try:
        if not options.report:
            run_all(options, records)
    finally:
        records.write_table()
    records.plot()
    print(records.table())


if __name__ == "__main__":
    main()
