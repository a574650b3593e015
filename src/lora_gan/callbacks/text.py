"""Text metrics of validation and test, and tables of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from lora_gan.embedding import MINILM, sentence_encoder
from lora_gan.metrics import distinct_n, exact_match, rouge_l
from lora_gan.types import Answered

TITLES = {"base": "base", "trained": "trained", "sampled": "trained, sampled"}


class TextMetrics(L.Callback):
    """Measures the answers of a validation or test pass, logs them, and shows some.

    Validation logs ``text/<metric>`` of the generator. Test logs ``test/<player>/<metric>``, base and generator side by
    side, prints the table and writes it to ``held_out.md`` in the run's folder.

    Args:
        samples: Answers shown in the tables.
        semantic_model: Sentence encoder of the semantic similarity.
    """

    def __init__(self, samples: int = 3, semantic_model: str = MINILM) -> None:
        self.samples = samples
        self.semantic_model = semantic_model
        self.seen: dict[str, list[Answered]] = {}

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen = {}

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        answers: Mapping[str, Answered] = outputs
        for player, answered in answers.items():
            self.seen.setdefault(player, []).append(answered)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = measure(self.seen["trained"], self.semantic_model)
        shown = {f"text/{name}": value for name, value in metrics.items()}
        pl_module.log_dict(shown, sync_dist=True)
        pl_module.log("exact", metrics["exact_match"], prog_bar=True, logger=False, sync_dist=True)
        self._write(trainer, "samples", samples_table(self.seen, self.samples))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = {player: measure(answered, self.semantic_model) for player, answered in self.seen.items()}
        logged = {f"test/{p}/{name}": value for p, values in metrics.items() for name, value in values.items()}
        pl_module.log_dict(logged, sync_dist=True)
        table = metrics_table(metrics) + "\n\n" + samples_table(self.seen, self.samples)
        self._write(trainer, "held_out", table)
        if trainer.is_global_zero:
            count = sum(len(answered.texts) for answered in self.seen["trained"])
            print(f"\nHeld-out test split, {count} prompts\n\n{table}\n")
            if trainer.log_dir:
                Path(trainer.log_dir, "held_out.md").write_text(table + "\n", encoding="utf-8")

    def _write(self, trainer: L.Trainer, tag: str, table: str) -> None:
        for sink in trainer.loggers:
            if isinstance(sink, TensorBoardLogger) and not trainer.sanity_checking:
                sink.experiment.add_text(tag, table, trainer.global_step)


def measure(answered: Sequence[Answered], semantic_model: str = MINILM) -> dict[str, float]:
    """Reward and text metrics of one player's answers to a whole split."""
    examples = [example for part in answered for example in part.examples]
    texts = [text for part in answered for text in part.texts]
    targets = [example.target for example in examples]
    count = max(len(texts), 1)
    similarity = sentence_encoder(semantic_model).similarity(texts, targets)
    return {
        "reward": sum(float(part.reward.sum()) for part in answered) / count,
        "exact_match": exact_match(texts, [example.references or (example.target,) for example in examples]),
        "rouge_l": rouge_l(texts, targets),
        "semantic": float(similarity.mean()),
        "distinct_2": distinct_n(texts, 2),
        "truncated": sum(int(part.truncated.sum()) for part in answered) / count,
    }


def metrics_table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: a row for each metric, a column for each player."""
    players = list(metrics)
    rows = [[name, *(f"{metrics[p][name]:.3f}" for p in players)] for name in metrics[players[0]]]
    return _markdown(["metric", *(TITLES.get(p, p) for p in players)], rows)


def samples_table(seen: Mapping[str, Sequence[Answered]], count: int) -> str:
    """Markdown: prompt, target and each player's answer for some prompts spread over the split."""
    players = list(seen)
    examples = [example for part in seen[players[0]] for example in part.examples]
    texts = {player: [text for part in seen[player] for text in part.texts] for player in players}
    chosen = range(0, len(examples), max(len(examples) // max(count, 1), 1))[:count]
    rows = [[examples[i].prompt, examples[i].target, *(texts[p][i] for p in players)] for i in chosen]
    return _markdown(["prompt", "target", *(TITLES.get(p, p) for p in players)], rows)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|") or " "
