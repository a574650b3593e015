"""Text metrics of validation and test, and tables of samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

from lora_gan.backbone import Backbone
from lora_gan.callbacks.last_checkpoint import run_folder
from lora_gan.checkpointing.state import Checkpointed
from lora_gan.data.source import Source
from lora_gan.distributed import in_order, several
from lora_gan.errors import LoraGANError
from lora_gan.evaluation import Evaluated
from lora_gan.final_answer import FinalAnswer
from lora_gan.lightning_compat import validate_now
from lora_gan.pretrain import completes, completions
from lora_gan.results import TITLES, Result, markdown_table, save_result
from lora_gan.rewards import Evidence, RetrievalReward, answers_of, references_of
from lora_gan.rewards.answer import is_right
from lora_gan.sentence_encoder import MINILM, sentence_encoder
from lora_gan.step_callback import StepModule
from lora_gan.text_metrics import bert_score, bleu, distinct_n, exact_match, mmd, ngram_entropy, rouge, self_bleu, words
from lora_gan.types import EvalOutput, Example

OwnMetric = Callable[[Sequence[str], Sequence[str]], float]


class TextMetrics(L.Callback):
    """Measures the completions and the targets of a validation or a test, logs the metrics, and shows samples.

    Validation logs ``text/<metric>`` of the generator's completions, and ``validation/loss`` and
    ``validation/perplexity``, the generator's token mean over all held-out targets; the first one is before training.
    Test logs ``test/<role>/<metric>`` of base, generator and, if it started from a saved adapter, the generator at the
    start. ``answer`` is the share of right final answers among the prompts that have accepted ones. Test prints the
    table, writes it to ``held_out.md``, and the numbers to ``results.json`` in the folder of the run whose checkpoint
    is tested. Of several instances only the last one is active, so that another configuration file can append its own.

    Args:
        samples: Number of completions in the tables.
        semantic_model: Sentence encoder of the semantic similarity and of the distance between the sets (mmd).
        bert_score_model: Adds BERTScore by this encoder, a hub id such as roberta-large or a local folder. It is slow.
        metrics: User metrics, by import path: functions of all completions and their targets that return one number,
            logged under the function's name. The target of a prompt without one is empty.
        before_training: Whether a new run begins with a validation.
    """

    def __init__(
        self,
        samples: int = 3,
        semantic_model: str = MINILM,
        bert_score_model: str | None = None,
        metrics: list[OwnMetric] | None = None,
        before_training: bool = True,
    ) -> None:
        self.samples = samples
        self.semantic_model = semantic_model
        self.bert_score_model = bert_score_model
        self.metrics = metrics or []
        self.before_training = before_training
        self.matched = False  # whether a completion of a validation was equal to its target
        self.seen: dict[str, list[EvalOutput]] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.before_training and trainer.global_step == 0 and not self._replaced(trainer):
            validate_now(trainer)

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
        completions: Mapping[str, EvalOutput] = outputs
        for role, answered in completions.items():
            self.seen.setdefault(role, []).append(answered)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._replaced(trainer):
            return
        self._gather(trainer.val_dataloaders)
        metrics = self._measure("trained", pl_module)
        logged = {f"text/{name}": value for name, value in metrics.items()}
        logged |= {f"validation/{name}": value for name, value in target_loss(self.seen["trained"]).items()}
        pl_module.log_dict(logged | {"step": float(trained_steps(pl_module))}, sync_dist=True)
        self.matched |= metrics.get("exact_match", 0.0) > 0
        if self.matched:
            pl_module.log("exact", metrics["exact_match"], prog_bar=True, logger=False, sync_dist=True)
        self._write(trainer, "samples", samples_table(self.seen, self.samples), trained_steps(pl_module))
        for reward in pl_module.rewards if isinstance(pl_module, StepModule) else ():
            if isinstance(reward, RetrievalReward) and reward.evidence:
                table = evidence_table(reward.evidence, self.samples)
                self._write(trainer, f"evidence/{reward.name}", table, trained_steps(pl_module))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._replaced(trainer):
            return
        self._gather(trainer.test_dataloaders)
        folder = run_folder(trainer)  # a broadcast, which every process must join
        result = self._result(trainer, pl_module)
        logged = {f"test/{p}/{name}": value for p, values in result.metrics.items() for name, value in values.items()}
        pl_module.log_dict(logged | {"step": float(result.step)}, sync_dist=True)
        table = result.table + "\n\n" + samples_table(self.seen, self.samples)
        self._write(trainer, "held_out", table, result.step)
        if trainer.is_global_zero:
            print(f"\nHeld-out test split, {result.prompts} prompts\n\n{table}\n")
            (folder / "held_out.md").write_text(table + "\n", encoding="utf-8")
            save_result(_run_of(trainer.ckpt_path) or folder, result)

    def _result(self, trainer: L.Trainer, module: L.LightningModule) -> Result:
        table = self._table(trainer, module)
        return Result(
            checkpoint=Path(trainer.ckpt_path or "").name,
            step=trained_steps(module),
            data=str(getattr(trainer.datamodule, "origin", "")),  # type: ignore[attr-defined]
            prompts=sum(len(answered.texts) for answered in self.seen["trained"]),
            metrics=table,
            counted={name: n for name, n in self._counted(module).items() if name in table["trained"]},
        )

    def _counted(self, module: L.LightningModule) -> dict[str, int]:
        """Of how many prompts the metrics that compare with right answers are shares."""
        found = _final_answer_of(module)
        examples = [example for part in self.seen["trained"] for example in part.examples]
        counts = {"exact_match": sum(bool(references_of(example)) for example in examples)}
        counts["answer"] = sum(bool(answers_of(example, found)) for example in examples)
        return counts

    def _table(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, dict[str, float]]:
        table = {role: self._measure(role, module) | target_loss(seen) for role, seen in self.seen.items()}
        source = getattr(trainer.datamodule, "source", None)  # type: ignore[attr-defined]
        probes = source.probes() if isinstance(source, Source) else ()
        if probes and isinstance(module, Evaluated):
            backbone = module.backbone
            for role, mode in (("base", backbone.reference), ("trained", backbone.generator)):
                with mode():
                    table[role]["knowledge_probe"] = kept(backbone, probes)
        return table

    def _replaced(self, trainer: L.Trainer) -> bool:
        return [c for c in trainer.callbacks if isinstance(c, TextMetrics)][-1] is not self  # type: ignore[attr-defined]

    def _gather(self, loader: Any) -> None:
        """Give every process the completions of all processes."""
        if several():
            count = rows_of(loader)
            self.seen = {role: in_order(one_by_one(answered), count) for role, answered in self.seen.items()}

    def _measure(self, role: str, module: L.LightningModule) -> dict[str, float]:
        found = _final_answer_of(module)
        metrics = measure(self.seen[role], self.semantic_model, self.bert_score_model, self.metrics, found)
        if isinstance(module, StepModule) and not any(reward.weight for reward in module.rewards):
            del metrics["reward"]  # always 0: the discriminator alone decides
        return metrics

    def _write(self, trainer: L.Trainer, tag: str, table: str, step: int) -> None:
        for sink in () if trainer.sanity_checking else trainer.loggers:
            if isinstance(sink, TensorBoardLogger):
                sink.experiment.add_text(tag, table, step)
            elif isinstance(sink, WandbLogger):
                sink.log_text(tag, columns=["table"], data=[[table]], step=step)
            elif isinstance(sink, MLFlowLogger):
                sink.experiment.log_text(sink.run_id, table, f"{tag}/{step}.md")


def rows_of(loader: Any) -> int | None:
    """How many rows the data of a loader have; None where it does not know."""
    data = getattr(loader, "dataset", None)
    return len(data) if isinstance(data, Sized) else None


def trained_steps(module: L.LightningModule) -> int:
    """Steps that the module has learned in, where loggers put what a validation or a test measures."""
    return module.trained_steps if isinstance(module, Checkpointed) else module.global_step


def _final_answer_of(module: L.LightningModule) -> FinalAnswer | None:
    return module.final_answer if isinstance(module, Evaluated) else None


def _run_of(checkpoint: str | Path | None) -> Path | None:
    """The folder of the run that wrote a checkpoint; None for a file that lies elsewhere."""
    folder = Path(checkpoint or "").parent
    return folder.parent if folder.name == "checkpoints" else None


def measure(
    answered: Sequence[EvalOutput],
    semantic_model: str = MINILM,
    bert_score_model: str | None = None,
    own: Sequence[OwnMetric] = (),
    final_answer: FinalAnswer | None = None,
) -> dict[str, float]:
    """Reward and text metrics of one role's completions to a whole split.

    The reward is the mean over the prompts to which one applies, 0 if there are none.
    Metrics that compare with targets use the prompts that have one, and are left out if none has. ``answer``, the
    share of right final answers, uses the prompts with accepted ones; it is there where final answers are a notion:
    ``final_answer`` finds them, or examples have ``answers``.

    Raises:
        LoraGANError: A user metric has the name of another metric, or does not return a finite number.
    """
    examples = [example for part in answered for example in part.examples]
    texts = [text for part in answered for text in part.texts]
    count = max(len(texts), 1)
    wanted = [i for i, example in enumerate(examples) if references_of(example)]
    known = [reward for part in answered for reward in part.reward.tolist() if not math.isnan(reward)]
    metrics = {"reward": sum(known) / max(len(known), 1)}
    metrics |= _answers(texts, examples, final_answer)
    if wanted:
        chosen = [examples[i] for i in wanted]
        said = [texts[i] for i in wanted]
        targets = [example.target or references_of(example)[0] for example in chosen]
        metrics["exact_match"] = exact_match(said, [references_of(example) for example in chosen])
        metrics |= compare(said, targets, semantic_model)
        if bert_score_model is not None:
            metrics["bert_score"] = bert_score(said, targets, bert_score_model)
    metrics |= variety(texts)
    metrics["length"] = sum(len(words(text)) for text in texts) / count
    metrics["truncated"] = sum(int(part.truncated.sum()) for part in answered) / count
    metrics |= _perplexity(answered) | _kl_to_base(answered)
    for function in own:
        _add_own(metrics, function, texts, [example.target for example in examples])
    return metrics


def _answers(
    completions: Sequence[str], examples: Sequence[Example], final_answer: FinalAnswer | None
) -> dict[str, float]:
    if final_answer is None and not any(example.answers for example in examples):
        return {}
    right = [
        is_right(text, example, final_answer)
        for text, example in zip(completions, examples, strict=True)
        if answers_of(example, final_answer)
    ]
    return {"answer": sum(right) / len(right)} if right else {}


def kept(backbone: Backbone, probes: Sequence[tuple[str, str]], most: int = 256) -> float:
    """Share of statements that greedy decoding in the active mode completes; of many, evenly spaced ones."""
    chosen = probes[:: -(-len(probes) // most)]
    asked = completions(backbone.tokenizer, chosen)
    model, device = backbone.causal_lm, backbone.device
    return float(completes(model, asked.ids.to(device), asked.labels.to(device)).float().mean())


def _kl_to_base(answered: Sequence[EvalOutput]) -> dict[str, float]:
    """Mean of log p − log p_base over sampled completions, an estimate of KL(p‖base) in nats a completion."""
    values = torch.cat([part.kl.double() for part in answered])
    return {"kl_to_base": float(values.mean())} if len(values) and values.isfinite().all() else {}


def target_loss(answered: Sequence[EvalOutput]) -> dict[str, float]:
    """Cross-entropy of the targets in nats, the mean over all their tokens, EOS included, and its exponential.

    Empty if no prompt has a target.
    """
    tokens = sum(int(part.target_tokens.sum()) for part in answered)
    if not tokens:
        return {}
    loss = -sum(float(part.target_logprob.double().sum()) for part in answered) / tokens
    return {"loss": loss, "perplexity": float(torch.tensor(loss).double().exp())}


def one_by_one(answered: Sequence[EvalOutput]) -> list[EvalOutput]:
    """Split the outputs into one for each prompt."""
    return [
        EvalOutput(**{f.name: getattr(part, f.name)[i : i + 1] for f in fields(part)})
        for part in answered
        for i in range(len(part.texts))
    ]


def compare(completions: Sequence[str], targets: Sequence[str], semantic_model: str = MINILM) -> dict[str, float]:
    """Metrics of completions against targets: words, meaning, and the distance between the two sets."""
    encoder = sentence_encoder(semantic_model)
    similarity = encoder.similarity(completions, targets)
    return {
        "bleu": bleu(completions, targets),
        **rouge(completions, targets),
        "semantic": float(similarity.mean()),
        "mmd": mmd(encoder.encode(completions), encoder.encode(targets, keep=True)),
    }


def variety(completions: Sequence[str]) -> dict[str, float]:
    """Metrics of the diversity of completions."""
    return {
        **{f"distinct_{n}": distinct_n(completions, n) for n in (1, 2, 3)},
        "entropy_2": ngram_entropy(completions, 2),
        "self_bleu": self_bleu(completions),
    }


def _perplexity(answered: Sequence[EvalOutput]) -> dict[str, float]:
    """Geometric mean of the completions' perplexities under the base."""
    perplexity = torch.cat([part.perplexity for part in answered])
    return {"perplexity_under_base": math.exp(float(perplexity.double().log().mean()))} if len(perplexity) else {}


def _add_own(
    metrics: dict[str, float], function: OwnMetric, completions: Sequence[str], targets: Sequence[str]
) -> None:
    name = str(getattr(function, "__name__", type(function).__name__))
    if name in metrics:
        raise LoraGANError(f"two metrics are named {name!r}; rename your function")
    value = function(completions, targets)
    try:
        metrics[name] = float(value)
    except (TypeError, ValueError) as error:
        raise LoraGANError(f"metric {name!r} must return one number, got {value!r}") from error
    if not math.isfinite(metrics[name]):
        raise LoraGANError(f"metric {name!r} must return a finite number, got {value!r}")


def evidence_table(evidence: Sequence[Evidence], count: int) -> str:
    """Markdown table of completions, their verdicts, and the passages found, most similar first."""
    rows = [
        [one.completion, f"{one.verdict:.2f}" if n == 0 else "", f"{similarity:.2f}", passage]
        for one in evidence[:count]
        for n, (passage, similarity) in enumerate(zip(one.passages, one.similarity, strict=True))
    ]
    return markdown_table(["completion", "verdict", "similarity", "passage"], rows)


def samples_table(seen: Mapping[str, Sequence[EvalOutput]], count: int) -> str:
    """Markdown table of question, target and each role's completion, for prompts spread over the split."""
    roles = list(seen)
    examples = [example for part in seen[roles[0]] for example in part.examples]
    texts = {role: [text for part in seen[role] for text in part.texts] for role in roles}
    chosen = range(0, len(examples), max(len(examples) // max(count, 1), 1))[:count]
    rows = [[_asked(examples[i]), _wanted(examples[i]), *(texts[p][i] for p in roles)] for i in chosen]
    return markdown_table(["prompt", "target", *(TITLES.get(p, p) for p in roles)], rows)


def _wanted(example: Example) -> str:
    """The target, or the accepted final answers or the tests of a prompt without one."""
    return example.target or ", ".join(example.answers) or "; ".join(example.tests)


def _asked(example: Example) -> str:
    """What the user said last, without the template around it; the whole prompt where there is no dialogue."""
    said = [message.content for message in example.messages if message.role == "user"]
    return said[-1] if said else example.prompt
