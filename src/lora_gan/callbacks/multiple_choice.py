"""Multiple choice at the test, and whether answers say anything."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import lightning as L

from lora_gan.data import InstructionDataModule
from lora_gan.data.tokenizer import encode_completions
from lora_gan.distributed import mean_of_all
from lora_gan.multiple_choice import Scored, choice_metrics, informative, score_choices
from lora_gan.rewards.truth import truth
from lora_gan.types import EvalOutput, PromptBatch


class ChoiceAccuracy(L.Callback):
    """Logs, of base and generator, ``test/<role>/truthfulqa/mc1``, ``…/mc2``, ``…/arc/accuracy`` and the like.

    They are measured on test examples that have incorrect answers (negatives). Of the answers that the roles give
    themselves, ``test/<role>/truth`` is the largest similarity to a correct answer less the largest to an incorrect
    one (:class:`~lora_gan.rewards.TruthReward`), and ``test/<role>/informative`` the share that is not "I don't know"
    in other words.

    Args:
        seed: Of the order in which choices are looked at.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.scored: dict[str, list[tuple[str, Scored]]] = defaultdict(list)
        self.informative: dict[str, list[bool]] = defaultdict(list)
        self.truth: dict[str, list[float]] = defaultdict(list)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.scored.clear()
        self.informative.clear()
        self.truth.clear()

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        answers: Mapping[str, EvalOutput] = outputs
        for role, answered in answers.items():
            self.informative[role] += map(informative, answered.texts)
            known = [i for i, example in enumerate(answered.examples) if example.target and example.negatives]
            examples = [answered.examples[i] for i in known]
            self.truth[role] += truth([answered.texts[i] for i in known], examples).tolist()
        with pl_module.backbone.reference():
            self.scored["base"] += self._scored(trainer, pl_module, batch)
        with pl_module.backbone.generator():
            self.scored["trained"] += self._scored(trainer, pl_module, batch)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = {role: choice_metrics(scored) for role, scored in self.scored.items()}
        logged = {f"test/{p}/{name}": value for p, values in metrics.items() for name, value in values.items()}
        logged |= {f"test/{p}/informative": fmean(said) for p, said in self.informative.items() if said}
        logged |= {f"test/{p}/truth": fmean(values) for p, values in self.truth.items() if values}
        pl_module.log_dict(mean_of_all(logged))

    def _scored(self, trainer: L.Trainer, pl_module: Any, batch: PromptBatch) -> list[tuple[str, Scored]]:
        data: InstructionDataModule = trainer.datamodule  # type: ignore[attr-defined]

        def ids(texts: Sequence[str]) -> list[tuple[int, ...]]:
            return [answer[:-1] for answer in encode_completions(data.tokenizer, texts)]  # without EOS

        asked = [example.source for example in batch.examples if example.target and example.negatives]
        found = score_choices(pl_module.backbone.logprobs, batch, ids, data.limits.total, self.seed)
        return list(zip(asked, found, strict=True))
