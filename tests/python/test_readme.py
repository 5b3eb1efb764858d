"""The example of README.md, on the CPU and smaller."""

import os
import pathlib
import re

import pytest

torch = pytest.importorskip("torch")
if not os.environ.get("TREEATTN_LIBRARY"):
    pytest.skip("TREEATTN_LIBRARY names no library", allow_module_level=True)

README = pathlib.Path(__file__).parents[2] / "README.md"


def test_the_example_runs_and_each_answer_is_what_it_is_alone():
    (code,) = (x for x in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "plan(" in x)
    for text, smaller in (
        ("1024, [700] * 16", "7, [3, 4, 2]"),
        ("(total, 32, 128,", "(total, 4, 16,"),
        ("(total, 8, 128,", "(total, 2, 16,"),
        ("torch.bfloat16", "torch.float64"),
        ('device="cuda"', 'device="cpu"'),
        (".cuda()", ""),
    ):
        assert text in code, f"README.md has no {text!r} any more"
        code = code.replace(text, smaller)
    names: dict = {}
    exec(code, names)
    q, k, v, out = (names[name] for name in ("q", "k", "v", "out"))
    prompt, begin = names["prompt"], names["prompt"]
    for answer in names["answers"]:
        row = [*range(prompt), *range(begin, begin + answer)]
        begin += answer
        alone = torch.nn.functional.scaled_dot_product_attention(
            *(x[row].transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True
        )
        torch.testing.assert_close(out[row], alone[0].transpose(0, 1))
    assert all(x.grad.isfinite().all() for x in (q, k, v))
