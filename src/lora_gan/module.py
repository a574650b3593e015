"""LoraGANModule: one round of training, readable from top to bottom in ``training_step``.

Nothing flows back inside a round. What crosses rounds is a handful of named knobs: callbacks write them, the round
reads them. A new variant is a new class behind a seam (reward, objective, advantage, policy loss), never a branch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lora_gan.advantages import AdvantageEstimator, MovingAverage
from lora_gan.backbone import DISCRIMINATOR, GENERATOR, Backbone, LoraSettings
from lora_gan.errors import LoraGANError, NonFiniteError
from lora_gan.knobs import Knobs
from lora_gan.losses import PolicyLoss, Reinforce, kl_loss
from lora_gan.objectives import JUNK, SAMPLED, TARGET, DiscriminatorObjective, RewardRegression, judge_metrics
from lora_gan.rewards import PerplexityReward, Reward, SemanticReward, weighted_sum
from lora_gan.rewards.base import check_names
from lora_gan.sampling import Sampling, sample
from lora_gan.tensors import kl_k3, masked_mean
from lora_gan.tree import PromptTree, grow, grow_scored
from lora_gan.types import Answered, Credit, Judgement, PromptBatch, RewardContext, Rollout, Scores

CHECKPOINT_VERSION = 1


@dataclass(frozen=True)
class Learned:
    """What the generator's update did."""

    metrics: Mapping[str, Tensor]


class LoraGANModule(L.LightningModule):
    """Two LoRA adapters on one frozen causal language model: a generator that answers, a discriminator that judges.

    The modes of the field are weights: supervised only (policy_weight 0), policy gradient only (supervised_weight 0),
    both (the default).

    Args:
        base: The frozen model: "builtin", any hub id, or a local folder of a causal language model.
        answers_per_prompt: Answers k sampled for each prompt in a round.
        sampling: How they are sampled.
        rewards: What makes an answer good; by default 0.7 semantic similarity + 0.3 perplexity.
        objective: What the discriminator learns; by default to predict the reward.
        advantage: Credit of an answer; by default its reward less a moving average.
        policy_loss: How credit becomes a loss; by default REINFORCE.
        supervised_weight: Weight of the cross-entropy on the targets (answer tokens only, token mean).
        policy_weight: Weight of the policy loss.
        adversarial_weight: Weight of the discriminator's score in the reward that the policy is paid.
        kl_coefficient: Weight of KL(generator‖base) in the generator's loss.
        train_discriminator: Whether the discriminator learns.
        junk_per_prompt: Wrong answers shown to the discriminator for each prompt: the example's hard negatives, or
            another prompt's target where it has none.
        generator_lora: Shape of the generator's adapter.
        discriminator_lora: Shape of the discriminator's adapter.
        generator_optimizer: The generator's optimizer.
        discriminator_optimizer: The discriminator's optimizer.
        generator_scheduler: Learning-rate schedule of the generator, stepped with its optimizer.
        discriminator_scheduler: Learning-rate schedule of the discriminator, stepped with its optimizer.
        gradient_clip: Largest norm of a player's gradient.
        accumulate_rounds: Rounds whose gradients are averaged into one step of both optimizers.
        dtype: Number format of the frozen base: float32, bfloat16 or float16.
    """

    def __init__(
        self,
        base: str = "builtin",
        answers_per_prompt: int = 4,
        sampling: Sampling = Sampling(),
        rewards: list[Reward] | None = None,
        objective: DiscriminatorObjective | None = None,
        advantage: AdvantageEstimator | None = None,
        policy_loss: PolicyLoss | None = None,
        supervised_weight: float = 1.0,
        policy_weight: float = 1.0,
        adversarial_weight: float = 0.0,
        kl_coefficient: float = 0.0,
        train_discriminator: bool = True,
        junk_per_prompt: int = 1,
        generator_lora: LoraSettings = LoraSettings(),
        discriminator_lora: LoraSettings = LoraSettings(),
        generator_optimizer: OptimizerCallable = lambda p: AdamW(p, lr=1e-3, weight_decay=0.0),
        discriminator_optimizer: OptimizerCallable = lambda p: AdamW(p, lr=1e-3, weight_decay=0.0),
        generator_scheduler: LRSchedulerCallable | None = None,
        discriminator_scheduler: LRSchedulerCallable | None = None,
        gradient_clip: float = 1.0,
        accumulate_rounds: int = 1,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        _at_least(1, answers_per_prompt=answers_per_prompt, accumulate_rounds=accumulate_rounds)
        _at_least(0, junk_per_prompt=junk_per_prompt, policy_weight=policy_weight, supervised_weight=supervised_weight)
        if gradient_clip <= 0:
            raise LoraGANError(f"gradient_clip must be > 0, got {gradient_clip}; a large one, 1e9 say, never clips")
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold what is trained, not the base
        self.base = base
        self.answers_per_prompt = answers_per_prompt
        self.sampling = sampling
        self.greedy = replace(sampling, do_sample=False)
        self.rewards = rewards if rewards is not None else [SemanticReward(), PerplexityReward()]
        check_names(self.rewards)
        self.objective = objective or RewardRegression()
        self.advantage = advantage or MovingAverage()
        if self.advantage.needs_group and answers_per_prompt < 2:
            raise LoraGANError(
                f"{type(self.advantage).__name__} compares the answers to one prompt: answers_per_prompt must be at "
                f"least 2, got {answers_per_prompt}"
            )
        self.policy_loss = policy_loss or Reinforce()
        self.junk_per_prompt = junk_per_prompt
        self.optimizer_factories = {GENERATOR: generator_optimizer, DISCRIMINATOR: discriminator_optimizer}
        self.scheduler_factories = {GENERATOR: generator_scheduler, DISCRIMINATOR: discriminator_scheduler}
        self.gradient_clip = gradient_clip
        self.accumulate_rounds = accumulate_rounds
        self.dtype_of_base = dtype
        self.lora = {GENERATOR: generator_lora, DISCRIMINATOR: discriminator_lora}
        self.backbone = Backbone(base, generator_lora, discriminator_lora, dtype)
        self.configured_knobs = {
            "supervised_weight": supervised_weight,
            "policy_weight": policy_weight,
            "adversarial_weight": adversarial_weight,
            "kl_coefficient": kl_coefficient,
            "discriminator_learning": float(train_discriminator),
        }
        self.knobs = Knobs(baseline=0.0, **self.configured_knobs)

    # the round

    @property
    def judging(self) -> bool:
        """Whether the discriminator takes part in this round: it learns, or its score is paid."""
        return bool(self.knobs.discriminator_learning or self.knobs.adversarial_weight)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Tensor]:
        """One round: play, score, judge, credit, learn."""
        with self._counted_round():
            rollout = self.play(batch)
            scores = self.score(rollout, batch, with_targets=self.judging)
            judgement = self.update_discriminator(rollout, scores, batch)
            paid = self.pay(scores, judgement)
            credit = self.credit(rollout, paid, judgement)
            learned = self.update_generator(rollout, scores, credit, batch)
            return self.report(rollout, scores, paid, judgement, credit, learned)

    def play(self, batch: PromptBatch) -> Rollout:
        """k answers for each prompt, no gradient; none in a round that has no use for them."""
        if not (self.knobs.policy_weight or self.knobs.kl_coefficient or self.judging):
            return Rollout.empty(self.device)
        with self.backbone.generator():
            return sample(self.backbone, batch.prompt_ids, self.answers_per_prompt, self.sampling)

    def score(self, rollout: Rollout, batch: PromptBatch, with_targets: bool) -> Scores:
        """Rewards of the answers and, by the same measure, of the targets; the reference pass happens here."""
        targets = batch if with_targets else PromptBatch.empty()
        answers = _by_prompt(rollout.answer_ids, rollout.k, len(batch))
        tree = grow_scored(batch.prompt_ids, {SAMPLED: answers, TARGET: _each(targets.target_ids, len(batch))})
        with self.backbone.reference():
            reference = self.backbone.logprobs(tree)
            temperature = self.sampling.temperature
            tempered = reference if temperature == 1 else self.backbone.logprobs(tree, {SAMPLED: temperature})
        mask = {kind: branches.mask for kind, branches in tree.branches.items()}
        sampled = RewardContext(rollout.k, reference[SAMPLED], mask[SAMPLED])
        paid = weighted_sum(self.rewards, rollout.texts, batch, sampled)
        wanted = weighted_sum(self.rewards, targets.targets, targets, RewardContext(1, reference[TARGET], mask[TARGET]))
        return Scores(paid.total, paid.parts, wanted.total, tempered[SAMPLED])

    def update_discriminator(self, rollout: Rollout, scores: Scores, batch: PromptBatch) -> Judgement:
        """The discriminator judges the fresh answers, then learns from them."""
        if not self.judging:
            return Judgement(torch.zeros_like(scores.total), {})
        learning = bool(self.knobs.discriminator_learning)
        tree = self._judged_tree(rollout, batch)
        with self.backbone.discriminator(), torch.set_grad_enabled(learning):
            judged = self.backbone.judge(tree)
            result = self.objective(judged, scores)
            if learning:
                self._optimize(DISCRIMINATOR, {"discriminator": result.loss})
        judged = {kind: scored.detach() for kind, scored in judged.items()}
        metrics = {
            "loss/discriminator": result.loss.detach(),
            **result.metrics,
            **judge_metrics(judged, scores, tree.branches[JUNK].row),
        }
        return Judgement(judged[SAMPLED], metrics)

    def pay(self, scores: Scores, judgement: Judgement) -> Tensor:
        """(N,) what the policy is paid: the rewards plus the discriminator's weighted score."""
        return scores.total + self.knobs.adversarial_weight * judgement.sampled

    def credit(self, rollout: Rollout, paid: Tensor, judgement: Judgement) -> Credit:
        """Advantages of the sampled tokens; none where nothing was sampled."""
        if len(rollout) == 0:
            return Credit(rollout.logprobs, {})
        if self.knobs.policy_weight:
            self._check_baseline()
        return self.advantage(rollout, paid, judgement, self.knobs.baseline)

    def update_generator(self, rollout: Rollout, scores: Scores, credit: Credit, batch: PromptBatch) -> Learned:
        """Supervised loss on the targets and policy loss on the sampled answers, one forward and one backward."""
        knobs = self.knobs
        branches: dict[str, list[list[Tensor]]] = {}
        if knobs.policy_weight or knobs.kl_coefficient:
            branches[SAMPLED] = _by_prompt(rollout.answer_ids, rollout.k, len(batch))
        if knobs.supervised_weight:
            branches[TARGET] = _each(batch.target_ids, len(batch))
        if not branches:
            return Learned({})
        tree = grow_scored(batch.prompt_ids, branches)
        metrics: dict[str, Tensor] = {}
        terms: dict[str, Tensor] = {}
        with self.backbone.generator():
            logprobs = self.backbone.logprobs(tree, {SAMPLED: self.sampling.temperature})
            if knobs.supervised_weight:
                metrics["loss/supervised"] = -masked_mean(logprobs[TARGET], tree.branches[TARGET].mask)
                terms["supervised"] = knobs.supervised_weight * metrics["loss/supervised"]
            if knobs.policy_weight:
                policy = self.policy_loss(logprobs[SAMPLED], rollout, credit)
                metrics |= {"loss/policy": policy.loss, **policy.metrics}
                terms["policy"] = knobs.policy_weight * policy.loss
            if knobs.kl_coefficient:
                terms["kl"] = knobs.kl_coefficient * kl_loss(logprobs[SAMPLED], rollout, scores.reference_logprobs)
            self._optimize(GENERATOR, terms)
        metrics["loss/generator"] = torch.stack(list(terms.values())).sum()
        return Learned({name: value.detach() for name, value in metrics.items()})

    def report(
        self,
        rollout: Rollout,
        scores: Scores,
        paid: Tensor,
        judgement: Judgement,
        credit: Credit,
        learned: Learned,
    ) -> dict[str, Tensor]:
        """Log the round once; callbacks read the same dictionary."""
        metrics = {**learned.metrics, **judgement.metrics, **credit.metrics}
        metrics |= {f"knob/{name}": value.clone() for name, value in self.knobs.named_buffers()}
        if len(scores.target_total):
            metrics["reward/target"] = scores.target_total.mean()
        if len(rollout):
            metrics |= {f"reward/{name}": part.mean() for name, part in scores.parts.items()}
            metrics["reward/total"] = paid.mean()
            metrics["policy/kl"] = masked_mean(kl_k3(rollout.logprobs, scores.reference_logprobs), rollout.mask)
            metrics["policy/entropy"] = -masked_mean(rollout.logprobs, rollout.mask)
            metrics["policy/length"] = rollout.mask.sum(-1).float().mean()
            metrics["policy/truncated"] = rollout.truncated.float().mean()
        shown = {name for name in metrics if name in ("reward/total", "loss/generator", "loss/discriminator")}
        self.log_dict({name: metrics[name] for name in shown}, prog_bar=True, batch_size=1)
        self.log_dict({name: value for name, value in metrics.items() if name not in shown}, batch_size=1)
        return metrics

    def _judged_tree(self, rollout: Rollout, batch: PromptBatch) -> PromptTree:
        """Sampled answers, targets and junk, all ending in EOS, so that nothing can be told from the format."""
        eos = torch.tensor([self.backbone.tokenizer.eos_token_id], device=self.device)
        ended = [
            torch.cat([answer if cut else answer[:-1], eos])
            for answer, cut in zip(rollout.answer_ids, rollout.truncated.tolist(), strict=True)
        ]
        sampled = _by_prompt(ended, rollout.k, len(batch))
        junk = [self._pick_junk(batch, b) for b in range(len(batch))]
        return grow(batch.prompt_ids, {SAMPLED: sampled, TARGET: _each(batch.target_ids, len(batch)), JUNK: junk})

    def _pick_junk(self, batch: PromptBatch, b: int) -> list[Tensor]:
        pool = list(batch.negative_ids[b]) or [
            target
            for target, other in zip(batch.target_ids, batch.examples, strict=True)
            if other.group != batch.examples[b].group
        ]
        return [pool[i] for i in torch.randperm(len(pool))[: self.junk_per_prompt].tolist()]

    # optimization

    def configure_optimizers(self) -> Any:
        optimizers = {p: make(self.backbone.parameters_of(p)) for p, make in self.optimizer_factories.items()}
        schedulers = [make(optimizers[p]) for p, make in self.scheduler_factories.items() if make is not None]
        return list(optimizers.values()), schedulers

    def _optimize(self, player: str, terms: Mapping[str, Tensor]) -> None:
        """Backward and, when the accumulation is full, step; the caller is inside the player's mode."""
        for name, term in terms.items():
            if not term.isfinite():
                raise NonFiniteError(self._stopped(f"loss/{name} is {term.item()}"))
        self.manual_backward(torch.stack(list(terms.values())).sum() / self.accumulate_rounds)
        if (self.trainer.global_step + 1) % self.accumulate_rounds:
            return
        index = list(self.optimizer_factories).index(player)
        optimizer = self.optimizers()[index]  # type: ignore[index]
        optimizer.step()
        optimizer.zero_grad()
        if self.scheduler_factories[player] is not None:
            schedulers = self.lr_schedulers()
            chosen = schedulers if not isinstance(schedulers, list) else schedulers[index]
            chosen.step()  # type: ignore[union-attr]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip one player's gradient; Lightning calls this after fp16 gradients are unscaled and before the step."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.gradient_clip)
        if not norm.isfinite() and self.trainer.precision != "16-mixed":  # fp16 skips such steps and lowers its scale
            raise NonFiniteError(self._stopped(f"the gradient's norm is {norm.item()}"))

    def _stopped(self, what: str) -> str:
        saved = getattr(self.trainer.checkpoint_callback, "best_model_path", "") or "none yet"
        return (
            f"{what} in round {self.trainer.global_step}; the step was not taken. "
            f"Lower the learning rate or check the rewards; last good checkpoint: {saved}"
        )

    @contextmanager
    def _counted_round(self) -> Iterator[None]:
        """Make ``trainer.global_step``, and with it ``max_steps`` and checkpoints, count rounds.

        Lightning counts each optimizer's steps (issue 17958); here the round counts once, however many were taken.
        """
        profiler = self.trainer.profiler  # type: ignore[attr-defined]
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer._on_before_step = lambda: profiler.start("optimizer_step")
            optimizer._on_after_step = lambda: profiler.stop("optimizer_step")
        rounds = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        rounds.increment_ready()
        yield
        rounds.increment_completed()

    def on_fit_start(self) -> None:
        if self.knobs.policy_weight:
            self._check_baseline()

    def _check_baseline(self) -> None:
        keepers = (getattr(callback, "keeps_baseline", False) for callback in getattr(self.trainer, "callbacks", []))
        if self.advantage.needs_baseline and not any(keepers):
            raise LoraGANError(
                f"{type(self.advantage).__name__} needs a baseline that somebody keeps: add "
                "lora_gan.callbacks.MovingAverageBaseline to trainer.callbacks, or choose another advantage"
            )

    # evaluation

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Answered]:
        """The generator answers greedily."""
        with self.backbone.generator():
            return {"trained": self.answer(batch, self.greedy)}

    def test_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Answered]:
        """Base and generator side by side, and the generator once more as it samples."""
        with self.backbone.reference():
            answered = {"base": self.answer(batch, self.greedy)}
        with self.backbone.generator():
            answered["trained"] = self.answer(batch, self.greedy)
            answered["sampled"] = self.answer(batch, self.sampling)
        return answered

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, str | float]]:
        """One record for each prompt: prompt, answer, target, reward."""
        with self.backbone.generator():
            answered = self.answer(batch, self.greedy)
        rewards = answered.reward.tolist()
        return [
            {"prompt": example.prompt, "answer": text, "target": example.target, "reward": reward}
            for example, text, reward in zip(answered.examples, answered.texts, rewards, strict=True)
        ]

    def answer(self, batch: PromptBatch, how: Sampling) -> Answered:
        """One answer for each prompt in the active mode, with its reward."""
        rollout = sample(self.backbone, batch.prompt_ids, 1, how)
        scores = self.score(rollout, batch, with_targets=False)
        return Answered(batch.examples, rollout.texts, rollout.truncated, scores.total)

    # checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep adapters, head and knobs; the base is named, not stored."""
        kept = self._kept()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        checkpoint["lora_gan"] = {
            "version": CHECKPOINT_VERSION,
            "base": self.base,
            "dtype": self.dtype_of_base,
            "knobs": self.configured_knobs,
            "optimizers": self._optimizer_settings(),
            **{player: asdict(settings) for player, settings in self.lora.items()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of something else, saying what differs; a knob configured anew keeps its new value."""
        described = checkpoint.get("lora_gan")
        if described is None:
            raise LoraGANError("this checkpoint was not written by lora-gan")
        mine = {"version": CHECKPOINT_VERSION, "base": self.base}
        mine |= {player: asdict(settings) for player, settings in self.lora.items()}
        if (
            self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        ):  # the optimizers' saved state would override new settings
            mine["optimizers"] = self._optimizer_settings()
        differing = [f"{k}: {described.get(k)} there, {v} here" for k, v in mine.items() if described.get(k) != v]
        if differing:
            raise LoraGANError("the checkpoint does not fit this configuration: " + "; ".join(differing))
        missing = self._kept() - set(checkpoint["state_dict"])
        if missing:
            raise LoraGANError(f"the checkpoint lacks {len(missing)} tensors, {min(missing)} for one")
        for name, value in self.configured_knobs.items():
            if described["knobs"][name] != value:  # set anew for the resumed run
                checkpoint["state_dict"][f"knobs.{name}"] = torch.tensor(float(value))

    def _optimizer_settings(self) -> dict[str, dict[str, float]]:
        """The numbers among each optimizer's settings: learning rate, weight decay and so on."""
        settings = {}
        for player, make in self.optimizer_factories.items():
            defaults = make([nn.Parameter(torch.zeros(1))]).defaults
            settings[player] = {name: float(v) for name, v in defaults.items() if isinstance(v, int | float)}
        return settings

    def _kept(self) -> set[str]:
        trained = {f"backbone.{name}" for name, p in self.backbone.named_parameters() if p.requires_grad}
        return trained | {f"knobs.{name}" for name, _ in self.knobs.named_buffers()}


def _by_prompt(answers: Sequence[Tensor], k: int, prompts: int) -> list[list[Tensor]]:
    """The k answers of each prompt."""
    return [list(answers[b * k : (b + 1) * k]) for b in range(prompts)]


def _each(answers: tuple[Tensor, ...], prompts: int) -> list[list[Tensor]]:
    """One branch for each prompt, or none."""
    return [[answer] for answer in answers] or [[] for _ in range(prompts)]


def _at_least(bound: float, **settings: float) -> None:
    for name, value in settings.items():
        if value < bound:
            raise LoraGANError(f"{name} must be at least {bound}, got {value}")
