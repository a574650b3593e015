"""Prediction writer: the file of ``predict``."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter

from lora_gan.atomic import atomic_file
from lora_gan.callbacks.last_checkpoint import run_folder
from lora_gan.distributed import in_order

logger = logging.getLogger("lora_gan")


class PredictionWriter(BasePredictionWriter):
    """Writes the completions of ``predict`` as JSON lines: prompt, completion, target, references, negatives, reward.

    Args:
        file: Name of the file in the run's folder.
    """

    def __init__(self, file: str = "predictions.jsonl") -> None:
        super().__init__("epoch")
        self.file = file

    def write_on_epoch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        path = run_folder(trainer) / self.file
        records = in_order([record for batch in predictions for record in batch])
        if not trainer.is_global_zero:
            return
        with atomic_file(path) as draft:
            draft.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
        logger.info("%d completions written to %s", len(records), os.path.relpath(path))
