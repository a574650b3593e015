"""Training in each precision of the trainer and each data type of the base."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch.optim import SGD, AdamW

from lora_gan.backbone import DISCRIMINATOR, GENERATOR
from lora_gan.discriminator.objectives import BradleyTerry
from lora_gan.errors import LoraGANError
from lora_gan.module import LoraGANModule
from lora_gan.number_formats import computes_in_bfloat16
from lora_gan.stepper import Stepper
from lora_gan.types import StepOutput

from .machine import Machine, relative
from .rows import Check, Finding, Skip
from .training import base_weights, both_roles, make_batches, make_module, weights_of

STEPS = 6
ROLES = (GENERATOR, DISCRIMINATOR)


@dataclass(frozen=True)
class Run:
    """A module after some steps, and what they gave."""

    module: LoraGANModule
    outputs: list[StepOutput]

    @classmethod
    def of(
        cls, module: LoraGANModule, machine: Machine, precision: str, steps: int = STEPS, targets: bool = True
    ) -> Run:
        stepper = Stepper(module, machine.device, precision)
        return cls(module, [stepper.step(batch) for batch in make_batches(module, steps, targets)])

    @property
    def supervised(self) -> float:
        """The first step's loss on the targets, which does not depend on samples."""
        return float(self.outputs[0].metrics["loss/supervised"])


def trained(machine: Machine, precision: str, dtype: str) -> Finding:
    """Some steps with coupling and gradient checkpointing."""
    if precision == "16-mixed" and not machine.is_cuda:
        raise Skip("16-mixed needs a CUDA GPU")
    exact = machine.keep("32-true", lambda: Run.of(make_module(), machine, "32-true", 1).supervised)
    module = make_module(dtype=dtype, gradient_checkpointing=True)
    before, base = {role: weights_of(module, role) for role in ROLES}, base_weights(module)
    steps = STEPS if machine.is_cuda else 3
    run = Run.of(module, machine, precision, steps)
    finite = all(v.isfinite() for o in run.outputs for n, v in o.metrics.items() if n.startswith("loss/"))
    error = abs(run.supervised / exact - 1)
    moved = sum(not torch.equal(before[role], weights_of(module, role)) for role in ROLES)
    kept = all(torch.equal(base[name], weight) for name, weight in base_weights(module).items())
    updates, needed = min(module.optimization.updates.values()), 4 if precision == "16-mixed" else steps
    disc = run.outputs[0].discriminator
    assert disc is not None
    kinds = {disc.sampled.dtype, *(p.dtype for role in ROLES for p in module.backbone.parameters_of(role))}
    text = (
        f"first loss off by {error:.2%}, {updates} of {steps} steps, moved {moved} of 2, base "
        f"{'kept' if kept else 'CHANGED'}, scores and adapters {'/'.join(str(k).removeprefix('torch.') for k in kinds)}"
    )
    right = finite and error <= 0.02 and updates >= needed and moved == 2 and kept and kinds == {torch.float32}
    return Finding(text, right, {"error": error, "updates": updates})


def refused(machine: Machine, precision: str) -> Finding:
    """A precision in which the adapters would be stored in 16 bits: works, or is refused with a remedy."""
    try:
        run = Run.of(make_module(), machine, precision, 2)
    except LoraGANError as error:
        return Finding(f"refused: {str(error)[:80]}…", True)
    moved = all(run.module.optimization.updates.values())
    return Finding("trains" if moved else "takes no step", moved)


def fused(machine: Machine) -> Finding:
    """fused AdamW would divide by the loss scale after the clipping."""
    try:
        Run.of(make_module(generator_optimizer=lambda p: AdamW(p, fused=True)), machine, "16-mixed", 1)
    except LoraGANError as error:
        return Finding(f"refused: {str(error)[:80]}…", True)
    return Finding("accepted", False)


def without_pairs(machine: Machine, precision: str) -> Finding:
    """A batch without targets: the objective makes no pair, so the discriminator has no gradient."""
    module = make_module(supervised=0.0, coupled=0.0, objective=BradleyTerry())
    before = weights_of(module, DISCRIMINATOR)
    Run.of(module, machine, precision, targets=False)
    kept, updates = torch.equal(before, weights_of(module, DISCRIMINATOR)), module.optimization.updates
    text = f"generator {updates[GENERATOR]} of {STEPS} steps, discriminator {updates[DISCRIMINATOR]}"
    return Finding(text, updates[GENERATOR] >= 4 and updates[DISCRIMINATOR] == 0 and kept)


def micro_batches(machine: Machine, precision: str) -> Finding:
    """One prompt a pass against all at once: the ratio of the updates of one step of plain SGD.

    Under 16-mixed a scale that changed between the passes would weight them differently.
    """
    moved = []
    for size in (None, 1):
        optimizers = dict.fromkeys(("generator_optimizer", "discriminator_optimizer"), partial(SGD, lr=1.0))
        module = make_module(coupled=0.0, micro_batch_size=size, max_grad_norm=1e9, **optimizers)
        before = both_roles(module)
        stepper = Stepper(module, machine.device, precision)
        if precision == "16-mixed":  # a scale at which no gradient overflows in the first step
            stepper.trainer.precision_plugin.scaler = torch.amp.GradScaler("cuda", init_scale=256.0)  # type: ignore
        torch.set_float32_matmul_precision("highest")  # a Stepper on a GPU chooses TensorFloat-32
        stepper.step(make_batches(module, 1)[0])
        moved.append(both_roles(module) - before)
    error, ratio = relative(moved[1], moved[0]), float(moved[1].norm() / moved[0].norm())
    limit = 1e-4 if precision == "32-true" else 2e-2
    return Finding(f"ratio {ratio:.5f}, relative difference {error:.1e}", error <= limit, {"ratio": ratio})


def automatic(machine: Machine) -> Finding:
    """What ``dtype: auto`` and a Stepper without a precision choose."""
    module = make_module(dtype="auto")
    stepper = Stepper(module, machine.device)
    stepper.step(make_batches(module, 1)[0])
    found = (stepper.trainer.precision, module.backbone.settings.dtype)
    wanted = ("bf16-mixed", "bfloat16") if computes_in_bfloat16(machine.device) else ("32-true", "float32")
    return Finding(f"{found[0]}, base {found[1]}", found == wanted)


PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
CHECKS = [
    *(
        Check(
            "precision",
            f"{precision}, base {dtype}",
            "first loss within 2 %; both learn; base kept; scores float32",
            partial(trained, precision=precision, dtype=dtype),
            5,
        )
        for precision in PRECISIONS
        for dtype in ("float32", "bfloat16")
    ),
    *(
        Check("precision", precision, "trains, or is refused", partial(refused, precision=precision), 5)
        for precision in ("bf16-true", "16-true")
    ),
    Check("precision", "dtype auto", "bf16-mixed and bfloat16 on CUDA ≥ 8.0, else float32", automatic, 5),
    Check("precision", "16-mixed, fused AdamW", "is refused", fused, 3, gpus=1),
    Check(
        "precision",
        "32-true, no pairs",
        "runs; the discriminator takes no step",
        partial(without_pairs, precision="32-true"),
        5,
    ),
    Check(
        "precision",
        "16-mixed, no pairs",
        "runs; the discriminator takes no step",
        partial(without_pairs, precision="16-mixed"),
        5,
        gpus=1,
    ),
    Check(
        "precision",
        "32-true, micro-batches",
        "relative difference ≤ 1e-4",
        partial(micro_batches, precision="32-true"),
        5,
    ),
    Check(
        "precision",
        "16-mixed, micro-batches",
        "relative difference ≤ 2e-2",
        partial(micro_batches, precision="16-mixed"),
        5,
        gpus=1,
    ),
]
