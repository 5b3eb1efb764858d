#!/usr/bin/env python3
"""Times treeattn.pack on about a million tokens, in several shapes and kinds of input.

Prints one JSON object per shape and input: the best of several runs on one core, all arrays and
maps included. `ms` is time on the clock, `cpu_ms` that of the core, which other work on the machine
does not lengthen; `tree_cpu_ms` is the library's part of it, from tokens to the copied arrays.

    TREEATTN_LIBRARY=build-shared/libtreeattn.so PYTHONPATH=python bench/pack.py
"""

import argparse
import json
import os
import time

import numpy as np

from treeattn import packing


def group(rng, prompts, answers, prompt, answer):
    rows = []
    for _ in range(prompts):
        head = rng.integers(0, 50_000, prompt)
        rows += [np.append(head, rng.integers(0, 50_000, answer)) for _ in range(answers)]
    return rows


def turns(rng, rollouts, turns, trunk, leaf):
    """Agents: after every turn a leaf that the next turn does not keep."""
    rows = []
    for _ in range(rollouts):
        kept = rng.integers(0, 50_000, 0)
        for _ in range(turns):
            kept = np.append(kept, rng.integers(0, 50_000, trunk))
            rows.append(np.append(kept, rng.integers(0, 50_000, leaf)))
    return rows


SHAPES = {
    "8 prompts of 4096, 16 answers of 4096 each": lambda rng: group(rng, 8, 16, 4096, 4096),
    "1 prompt of 8192, 64 answers of 8192": lambda rng: group(rng, 1, 64, 8192, 8192),
    "12 agents, 16 turns of 700 + 400": lambda rng: turns(rng, 12, 16, 700, 400),
    "nothing shared, 128 rows of 8192": lambda rng: list(rng.integers(0, 50_000, (128, 8192))),
    "all equal, 128 rows of 8192": lambda rng: [rng.integers(0, 50_000, 8192)] * 128,
    "350,000 rows of 3": lambda rng: list(rng.integers(0, 50_000, (350_000, 3))),
}


def best_ms(run, repeats):
    """Milliseconds on the clock and of the core."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter(), time.thread_time()
        run()
        times.append((time.perf_counter() - begin[0], time.thread_time() - begin[1]))
    return [round(1e3 * min(column), 1) for column in zip(*times)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    for name, make in SHAPES.items():
        rows = make(np.random.default_rng(0))
        lengths = np.array([len(row) for row in rows])
        flat = np.concatenate(rows)
        offsets = np.append(0, np.cumsum(lengths))
        lists = [row.tolist() for row in rows]
        _, tree_cpu_ms = best_ms(
            lambda: packing._Host.build(flat, offsets, 1, None, np.arange(lengths.size)),
            options.repeats,
        )
        inputs = {
            "flat": lambda: packing.pack(flat, lengths),
            "arrays": lambda: packing.pack(rows),
            "lists": lambda: packing.pack(lists),
        }
        for kind, run in inputs.items():
            packed_tokens = run().num_tokens
            ms, cpu_ms = best_ms(run, options.repeats)
            line = {
                "shape": name,
                "input": kind,
                "row_tokens": int(flat.size),
                "packed_tokens": packed_tokens,
                "ms": ms,
                "cpu_ms": cpu_ms,
                "tree_cpu_ms": tree_cpu_ms,
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
