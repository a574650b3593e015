"""Accuracy of the discriminator on held-out preferences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch

from lora_gan.callbacks.text_metrics import TextMetrics, rows_of, trained_steps
from lora_gan.discriminator.objectives import share_won
from lora_gan.discriminator.restored import score
from lora_gan.distributed import in_order
from lora_gan.errors import LoraGANError
from lora_gan.lightning_compat import validate_now
from lora_gan.step_callback import StepModule, step_module
from lora_gan.types import PromptBatch

Pairs = list["Pair"]  # of one prompt


@dataclass(frozen=True)
class Pair:
    """A target and a worse completion of the data: differences target − worse."""

    margin: float  # of the discriminator's scores
    longer: int  # tokens


class PreferenceAccuracy(L.Callback):
    """Measures how often the discriminator scores a held-out target above the worse completions of its prompt.

    They are the data's own: ``rejected`` answers, wrong answers. In validations it logs ``preference/accuracy`` (equal
    scores count half), ``preference/margin`` (mean difference of the scores) and ``preference/length_accuracy``, that
    of the better of the two rules "the longer one is better" and "the shorter one"; ``preference/against_length`` is
    the accuracy on the pairs about which that rule is wrong. A discriminator that has learned nothing but lengths has
    the length rule's accuracy, and 0 there. In a test the names begin with ``test/``, and a line is printed.
    Without a :class:`~lora_gan.callbacks.TextMetrics`, which does it, a run begins with a validation.
    """

    def __init__(self) -> None:
        self.seen: list[Pairs] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        read = step_module(pl_module, self).discriminator.model.input_format
        if read.reads_target:
            raise LoraGANError(
                f"PreferenceAccuracy compares a target with a worse completion, and {type(read).__name__} reads the "
                "target beside each: choose another input_format, or remove the callback"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        others: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if trainer.global_step == 0 and not any(isinstance(callback, TextMetrics) for callback in others):
            validate_now(trainer)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.seen += pairs_of(step_module(pl_module, self), batch)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = self._measured(trainer.val_dataloaders)
        if not found:
            raise LoraGANError(
                "PreferenceAccuracy finds no worse answers beside the targets of the validation: give rows with a "
                "rejected answer (data.path), or remove the callback"
            )
        self._log(pl_module, found)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = self._measured(trainer.test_dataloaders)
        self._log(pl_module, {f"test/{name}": value for name, value in found.items()})
        if trainer.is_global_zero and found:
            said = ", ".join(f"{name.removeprefix('preference/')} {value:.3f}" for name, value in found.items())
            print(f"\nHeld-out preferences, {sum(map(len, self.seen))} pairs: {said}")

    def _log(self, module: L.LightningModule, metrics: dict[str, float]) -> None:
        module.log_dict(metrics | {"step": float(trained_steps(module))}, sync_dist=True)

    def _measured(self, loader: Any) -> dict[str, float]:
        self.seen = in_order(self.seen, rows_of(loader))
        found = [pair for pairs in self.seen for pair in pairs]
        return {f"preference/{name}": value for name, value in preference_metrics(found).items()}


@torch.no_grad()
def pairs_of(module: StepModule, batch: PromptBatch) -> list[Pairs]:
    """For each of the B prompts the pairs of its target and each worse completion of the data."""
    found: list[Pairs] = [[] for _ in range(len(batch))]
    targets = set(batch.with_target)
    known = [b for b, worse in enumerate(batch.negative_ids) if worse and b in targets]
    for part in module.optimization.parts(len(known)):
        prompts = [known[i] for i in part]
        shown = [[batch.target_ids[b], *batch.negative_ids[b]] for b in prompts]
        if not shown:
            continue
        scores = score(module.discriminator.model, module.backbone, [batch.prompt_ids[b] for b in prompts], shown)
        remaining = iter(scores.tolist())
        for b, row in zip(prompts, shown, strict=True):
            target, *worse = (next(remaining) for _ in row)
            lengths = [len(row[0]) - len(each) for each in row[1:]]
            found[b] = [Pair(target - each, longer) for each, longer in zip(worse, lengths, strict=True)]
    return found


def preference_metrics(pairs: Sequence[Pair]) -> dict[str, float]:
    """What :class:`PreferenceAccuracy` logs; nothing without pairs."""
    if not pairs:
        return {}
    margins = torch.tensor([pair.margin for pair in pairs], dtype=torch.float64)
    longer = torch.tensor([pair.longer for pair in pairs])
    by_longer = float(share_won(longer))
    against = margins[longer < 0 if by_longer >= 0.5 else longer > 0]  # where the better of the two rules is wrong
    return {
        "accuracy": float(share_won(margins)),
        "margin": float(margins.mean()),
        "length_accuracy": max(by_longer, 1 - by_longer),
        **({"against_length": float(share_won(against))} if len(against) else {}),
    }
