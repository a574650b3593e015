"""Forward and backward pass of prompt trees against padded rows with flash attention."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from tests.benchmarks.passes import Passes

from .decode import dtype_of
from .machine import Machine, relative
from .rows import Check, Finding
from .tree import NEVER, computing_in, flex_from

SHAPES = ((512, 64, 8), (64, 512, 8), (256, 256, 8))  # prompt, completion, completions per prompt
PROMPTS = 2


def compared(machine: Machine, shape: tuple[int, int, int], faster: float) -> Finding:
    """Prompts of one length, so that the rows need no mask and their attention is flash."""
    prompt, completion, k = shape if machine.is_cuda else tuple(max(4, n // 16) for n in shape[:2]) + shape[2:]
    size = replace(
        machine.small,
        prompts=PROMPTS,
        prompt_tokens=prompt,
        completion_tokens=completion,
        num_generations=k,
        spread=0.0,
    )
    backbone = machine.backbone(machine.small, dtype_of(machine))
    side = Passes(size, backbone)
    with computing_in(machine, dtype_of(machine)):
        error = relative(side.tree(), side.rows())
        seconds = {"tree": machine.seconds(side.tree), "rows": machine.seconds(side.rows)}
        if machine.is_cuda:
            with flex_from(NEVER):
                seconds["tree by SDPA"] = machine.seconds(side.tree)
        peaks = {"tree": machine.peak(side.tree), "rows": machine.peak(side.rows)} if machine.is_cuda else {}
    ratio = seconds["rows"] / seconds["tree"]
    parameters = sum(p.numel() for name, p in backbone.lm.named_parameters() if "embed" not in name)
    flops = 4 * parameters * PROMPTS * (prompt + k * completion) / seconds["tree"]  # weights have no gradient
    text = ", ".join(
        [
            *(f"{name} {1e3 * spent:.0f} ms" for name, spent in seconds.items()),
            f"× {ratio:.2f}",
            f"{flops / 1e12:.3g} TFLOP/s",
            *(f"{name} peak {peak / 1e9:.1f} GB" for name, peak in peaks.items()),
            f"gradients differ by {error:.1e}",
        ]
    )
    return Finding(text, ratio >= faster, {"ratio": ratio, "error": error, **seconds, **peaks})


CHECKS = [
    Check(
        "passes",
        f"prompt {p}, completion {t}, k {k}",
        f"tree ≥ {faster} × rows",
        partial(compared, shape=(p, t, k), faster=faster),
        20,
        speed=True,
    )
    for (p, t, k), faster in zip(SHAPES, (2.0, 1.0, 1.0), strict=True)
]
