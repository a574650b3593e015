"""Prediction writer: the file of ``predict``."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter

from lora_gan.distributed import in_order

logger = logging.getLogger(__name__)


class PredictionWriter(BasePredictionWriter):
    """Writes the completions of ``predict`` as JSON lines: prompt, completion, target, reward.

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
        path = Path(trainer.log_dir or ".") / self.file
        records = in_order([record for batch in predictions for record in batch])
        if not trainer.is_global_zero:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as stream:
            for record in records:
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        logger.info("completions written to %s", path)
