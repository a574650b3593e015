"""LoraGANModule: one round of training, readable from top to bottom in ``training_step``.

Nothing flows back inside a round. What crosses rounds is a handful of named knobs: callbacks write them, the round
reads them. A new variant is a new class behind a seam (reward, objective, advantage, policy loss), never a branch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lora_gan.adapters import load_player
from lora_gan.advantages import AdvantageEstimator, MovingAverage
from lora_gan.backbone import DISCRIMINATOR, GENERATOR, Backbone, LoraSettings, Predicted
from lora_gan.checkpoints import Checkpointed
from lora_gan.coupling import StraightThrough
from lora_gan.discriminator import Discriminator
from lora_gan.errors import LoraGANError, NonFiniteError
from lora_gan.judges import AdapterJudge, Judge
from lora_gan.knobs import Knobs
from lora_gan.losses import PolicyLoss, Reinforce, kl_loss, moved_kl, value_loss
from lora_gan.negatives import HardNegatives, Negatives
from lora_gan.objectives import OPPONENT, SAMPLED, TARGET, DiscriminatorObjective, RewardRegression, judge_metrics
from lora_gan.payoffs import Payoff, RawScore
from lora_gan.processes import any_of, mean_of_all, shares
from lora_gan.replay import Replay
from lora_gan.rewards import (
    Combination,
    PerplexityReward,
    Reward,
    SemanticReward,
    WeightedSum,
    weighted_sum,
    weights_of,
)
from lora_gan.rewards.base import check_names
from lora_gan.sampling import Sampling, sample
from lora_gan.tensors import kl_k3, masked_mean, masked_row_mean
from lora_gan.tree import grow_scored
from lora_gan.types import (
    Answered,
    Credit,
    Earnings,
    Judgement,
    Learned,
    Lesson,
    LossTerm,
    PromptBatch,
    RewardContext,
    Rollout,
    Scores,
)

REFERENCES = ("base", "snapshot")
JUDGE = "judge"  # the discriminator's payoff among the rewards
LOSS_KNOBS = {  # the generator's losses and the knobs that weigh them
    "supervised": "supervised_weight",
    "policy": "policy_weight",
    "value": "value_coefficient",
    "kl": "kl_coefficient",
    "entropy": "entropy_coefficient",
    "coupled": "coupled_weight",
}


class LoraGANModule(Checkpointed):
    """Two LoRA adapters on one frozen causal language model: a generator that answers, a discriminator that judges.

    The modes of the field are weights: supervised only (policy_weight 0), policy gradient only (supervised_weight 0),
    both (the default).

    Args:
        base: The frozen model: "builtin", any hub id, or a local folder of a causal language model.
        answers_per_prompt: Answers k sampled for each prompt in a round.
        sampling: How they are sampled.
        rewards: What makes an answer good; by default 0.7 semantic similarity + 0.3 perplexity.
        combination: How the rewards and the payoff become what the policy is paid; by default their weighted sum.
        judge: Architecture of the discriminator; by default the second adapter on the shared base.
        objective: What the discriminator learns; by default to predict the reward.
        negatives: Worse answers that the discriminator is shown; by default one hard negative for each prompt.
        replay: Old samples that the discriminator is shown again; by default none.
        payoff: What the discriminator's score is worth to the generator; by default the score itself.
        advantage: Credit of an answer; by default its reward less a moving average.
        policy_loss: How credit becomes a loss; by default REINFORCE.
        coupling: Relaxation of the samples through which the discriminator's gradient reaches the generator, where
            coupled_weight is not 0.
        supervised_weight: Weight of the cross-entropy on the targets (answer tokens only, token mean).
        policy_weight: Weight of the policy loss.
        adversarial_weight: Weight of the payoff in the reward that the policy is paid.
        coupled_weight: Weight of −log P(close) in the generator's loss, differentiated through relaxed samples.
        kl_coefficient: Weight of KL(generator‖reference) in the generator's loss (k3, token mean).
        kl_penalty: Weight of log π − log reference taken off the reward at each token (k1).
        kl_reference: Whom the generator shall stay near to: "base", or "snapshot", the generator as it was when a
            callback took one.
        entropy_coefficient: Weight of the entropy bonus (nats a token).
        value_coefficient: Weight of the value head's loss, for advantages that need one.
        value_clip: How far the value head's prediction may move in a round before it counts no more.
        truncated_penalty: Taken off the reward of an answer that the length limit cut off.
        mask_truncated: Whether such answers are left out of the policy's losses.
        discriminator_updates: Updates of the discriminator in a round; 0: it does not learn.
        generator_lora: Shape of the generator's adapter.
        discriminator_lora: Shape of the discriminator's adapter.
        generator_optimizer: The generator's optimizer.
        discriminator_optimizer: The discriminator's optimizer.
        generator_scheduler: Learning-rate schedule of the generator, stepped once in each round in which it learned.
        discriminator_scheduler: Learning-rate schedule of the discriminator, stepped likewise.
        generator_adapter: PEFT folder or hub id from which the generator starts, of another run say.
        discriminator_adapter: Folder from which the discriminator starts, its head included.
        gradient_clip: Largest norm of a player's gradient.
        accumulate_rounds: Rounds whose gradients are averaged into one step of both optimizers.
        dtype: Number format of the frozen base: float32, bfloat16 or float16.
        quantization: "4bit" or "8bit" quantises the frozen base's linear layers (bitsandbytes, on a CUDA GPU).
        gradient_checkpointing: Save memory for time: keep the layers' inputs only, and compute them again in the
            backward pass. The gradients are the same.
    """

    def __init__(
        self,
        base: str = "builtin",
        answers_per_prompt: int = 4,
        sampling: Sampling = Sampling(),
        rewards: list[Reward] | None = None,
        combination: Combination | None = None,
        judge: Judge | None = None,
        objective: DiscriminatorObjective | None = None,
        negatives: list[Negatives] | None = None,
        replay: Replay | None = None,
        payoff: Payoff | None = None,
        advantage: AdvantageEstimator | None = None,
        policy_loss: PolicyLoss | None = None,
        coupling: StraightThrough | None = None,
        supervised_weight: float = 1.0,
        policy_weight: float = 1.0,
        adversarial_weight: float = 0.0,
        coupled_weight: float = 0.0,
        kl_coefficient: float = 0.0,
        kl_penalty: float = 0.0,
        kl_reference: str = "base",
        entropy_coefficient: float = 0.0,
        value_coefficient: float = 0.1,
        value_clip: float = 0.2,
        truncated_penalty: float = 0.0,
        mask_truncated: bool = False,
        discriminator_updates: int = 1,
        generator_lora: LoraSettings = LoraSettings(),
        discriminator_lora: LoraSettings = LoraSettings(),
        generator_optimizer: OptimizerCallable = lambda p: AdamW(p, lr=1e-3, weight_decay=0.0),
        discriminator_optimizer: OptimizerCallable = lambda p: AdamW(p, lr=1e-3, weight_decay=0.0),
        generator_scheduler: LRSchedulerCallable | None = None,
        discriminator_scheduler: LRSchedulerCallable | None = None,
        generator_adapter: str | None = None,
        discriminator_adapter: str | None = None,
        gradient_clip: float = 1.0,
        accumulate_rounds: int = 1,
        dtype: str = "float32",
        quantization: str | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _at_least(1, answers_per_prompt=answers_per_prompt, accumulate_rounds=accumulate_rounds)
        _at_least(0, policy_weight=policy_weight, supervised_weight=supervised_weight, coupled_weight=coupled_weight)
        _at_least(0, discriminator_updates=discriminator_updates, value_coefficient=value_coefficient)
        if gradient_clip <= 0:
            raise LoraGANError(f"gradient_clip must be > 0, got {gradient_clip}; a large one, 1e9 say, never clips")
        if kl_reference not in REFERENCES:
            raise LoraGANError(f"kl_reference must be one of {', '.join(REFERENCES)}, got {kl_reference!r}")
        self.automatic_optimization = False
        self.base = base
        self.answers_per_prompt = answers_per_prompt
        self.sampling = sampling
        self.greedy = replace(sampling, do_sample=False, num_beams=1)
        self.rewards = rewards if rewards is not None else [SemanticReward(), PerplexityReward()]
        check_names(self.rewards)
        self.combination = combination or WeightedSum()
        self.payoff = payoff or RawScore()
        self.advantage = advantage or MovingAverage()
        self.policy_loss = policy_loss or Reinforce()
        self.coupling = coupling or StraightThrough()
        self.kl_reference = kl_reference
        self.value_clip = value_clip
        self.truncated_penalty = truncated_penalty
        self.mask_truncated = mask_truncated
        self.optimizer_factories = {GENERATOR: generator_optimizer, DISCRIMINATOR: discriminator_optimizer}
        self.scheduler_factories = {GENERATOR: generator_scheduler, DISCRIMINATOR: discriminator_scheduler}
        self.gradient_clip = gradient_clip
        self.accumulate_rounds = accumulate_rounds
        self.dtype_of_base = dtype
        self.lora = {GENERATOR: generator_lora, DISCRIMINATOR: discriminator_lora}
        self.backbone = Backbone(base, generator_lora, discriminator_lora, dtype, quantization, gradient_checkpointing)
        self.discriminator = Discriminator(
            judge or AdapterJudge(),
            objective or RewardRegression(),
            [HardNegatives()] if negatives is None else negatives,
            replay or Replay(),
        )
        self.discriminator.judge.build(self.backbone)
        self.value_head = nn.Linear(self.backbone.hidden_size, 1) if self.advantage.needs_values else None
        for player, adapter in ((GENERATOR, generator_adapter), (DISCRIMINATOR, discriminator_adapter)):
            if adapter is not None:
                load_player(self, player, adapter)
        self.configured_knobs = {
            "supervised_weight": supervised_weight,
            "policy_weight": policy_weight,
            "adversarial_weight": adversarial_weight,
            "coupled_weight": coupled_weight,
            "kl_coefficient": kl_coefficient,
            "kl_penalty": kl_penalty,
            "entropy_coefficient": entropy_coefficient,
            "value_coefficient": value_coefficient,
            "discriminator_updates": float(discriminator_updates),
        }
        self.knobs = Knobs(
            baseline=0.0,
            adversarial_scale=1.0,
            adversarial_gate=1.0,
            discriminator_gate=1.0,
            easiest_share=1.0,
            **self.configured_knobs,
        )
        self.frozen: frozenset[str] = frozenset()  # players that take part and do not learn
        self.rollout = Rollout.empty(self.device)  # of the last round, for callbacks
        self.scores: Scores | None = None  # likewise
        self.judgement: Judgement | None = None  # likewise
        self.phase_seconds: dict[str, float] = {}  # of the last round, for callbacks
        self._check_combination()

    def _check_combination(self) -> None:
        for part in (self.advantage, self.combination):
            if part.needs_group and self.answers_per_prompt < 2:
                raise LoraGANError(
                    f"{type(part).__name__} compares the answers to one prompt: answers_per_prompt must be at least 2, "
                    f"got {self.answers_per_prompt}"
                )
        if self.configured_knobs["coupled_weight"] and not self.discriminator.judge.differentiable:
            raise LoraGANError(
                "coupled_weight needs a judge that reads relaxed samples, such as AdapterJudge; "
                f"{type(self.discriminator.judge).__name__} reads whole words: set coupled_weight to 0 and pay its "
                "score by adversarial_weight"
            )
        updates = max(
            self.policy_loss.epochs * self.policy_loss.minibatches, self.configured_knobs["discriminator_updates"]
        )
        if self.accumulate_rounds > 1 and updates > 1:
            raise LoraGANError(
                "accumulate_rounds > 1 makes one step of several rounds, but a player takes several steps in each "
                "round here: set epochs, minibatches and discriminator_updates to 1, or accumulate_rounds to 1"
            )

    # the round

    @property
    def judging(self) -> bool:
        """Whether the discriminator takes part in this round: it learns, or somebody wants its opinion."""
        knobs = self.knobs
        wanted = self.advantage.needs_judge and knobs.policy_weight
        return bool(knobs.discriminator_updates or knobs.adversarial_weight or knobs.coupled_weight or wanted)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Tensor]:
        """One round: play, score, judge, credit, learn."""
        self.seed_round()
        with self._counted_round():
            with self._timed("play"):
                rollout = self.play(batch)
                opponent = self.play_opponent(batch)
            with self._timed("score"):
                scores = self.score(rollout, batch, with_targets=self.judging)
            with self._timed("discriminator"):
                judgement = self.update_discriminator(rollout, opponent, scores, batch)
            with self._timed("generator"):
                earnings = self.pay(rollout, scores, judgement, batch)
                credit = self.credit(rollout, earnings)
                learned = self.update_generator(rollout, scores, judgement, credit, batch)
            self._step_schedulers()
            return self.report(rollout, scores, earnings, judgement, credit, learned)

    def play(self, batch: PromptBatch) -> Rollout:
        """k answers for each prompt, no gradient; none in a round that has no use for them."""
        knobs = self.knobs
        weights = (knobs.policy_weight, knobs.kl_coefficient, knobs.entropy_coefficient, knobs.coupled_weight)
        if not (any(weights) or self.judging):
            self.rollout = Rollout.empty(self.device)
            return self.rollout
        with self.backbone.generator():
            self.rollout = sample(self.backbone, batch.prompt_ids, self.answers_per_prompt, self.sampling)
        return self.rollout

    def play_opponent(self, batch: PromptBatch) -> Rollout:
        """The answers of the generator's last snapshot, where the payoff compares with them."""
        if not (self.payoff.needs_opponent and self.judging):
            return Rollout.empty(self.device)
        with self.backbone.snapshot():
            return sample(self.backbone, batch.prompt_ids, self.answers_per_prompt, self.sampling)

    def score(self, rollout: Rollout, batch: PromptBatch, with_targets: bool) -> Scores:
        """Rewards of the answers and, by the same measure, of the targets; the reference pass happens here."""
        targets = batch.of(batch.answered) if with_targets else PromptBatch.empty()
        answers = _by_prompt(rollout.answer_ids, rollout.k, len(batch))
        tree = grow_scored(
            batch.prompt_ids,
            {SAMPLED: answers, TARGET: _targets(batch) if with_targets else [[] for _ in range(len(batch))]},
        )
        temperature = {SAMPLED: self.sampling.temperature}
        with self.backbone.reference():
            base = self.backbone.logprobs(tree)
            reference = base if self.sampling.temperature == 1 else self.backbone.logprobs(tree, temperature)
        if self.kl_reference == "snapshot":
            with self.backbone.snapshot():
                reference = self.backbone.logprobs(tree, temperature)
        mask = {kind: branches.mask for kind, branches in tree.branches.items()}
        sampled = RewardContext(rollout.k, base[SAMPLED], mask[SAMPLED])
        paid = weighted_sum(self.rewards, rollout.texts, batch, sampled)
        wanted = weighted_sum(self.rewards, targets.targets, targets, RewardContext(1, base[TARGET], mask[TARGET]))
        return Scores(
            paid.total, paid.parts, paid.applies, wanted.total, wanted.parts, reference[SAMPLED], base[SAMPLED]
        )

    def update_discriminator(
        self, rollout: Rollout, opponent: Rollout, scores: Scores, batch: PromptBatch
    ) -> Judgement:
        """The discriminator judges the fresh answers, then learns from them."""
        if not self.judging:
            nothing = scores.total[:0]
            return Judgement(torch.zeros_like(scores.total), nothing, nothing, rollout.k, {})
        learns = DISCRIMINATOR not in self.frozen
        updates = int(learns * self.knobs.discriminator_updates * self.knobs.discriminator_gate)
        player = self.discriminator
        exhibit = player.exhibit(self.backbone.tokenizer, batch, rollout, opponent, scores)
        with player.judge.mode(self.backbone), torch.set_grad_enabled(updates > 0):
            judged = player(self.backbone, exhibit)
            term = player.objective(judged)
            fresh = {kind: opinion.where(opinion.prompt < exhibit.fresh) for kind, opinion in judged.items()}
            metrics = {"loss/discriminator": term.loss.detach(), **term.metrics, **judge_metrics(fresh)}
            for update in range(updates):
                if update:
                    term = player.objective(player(self.backbone, exhibit))
                self._optimize(DISCRIMINATOR, {"discriminator": term.loss})
        player.remember(exhibit)
        theirs = fresh[OPPONENT].score if OPPONENT in fresh else scores.total[:0]
        return Judgement(fresh[SAMPLED].score, fresh[TARGET].score, theirs, rollout.k, metrics)

    def pay(self, rollout: Rollout, scores: Scores, judgement: Judgement, batch: PromptBatch) -> Earnings:
        """What the policy is paid: rewards and the discriminator's payoff at the last token, penalties on the way."""
        knobs = self.knobs
        parts, weights = dict(scores.parts), weights_of(self.rewards)
        if knobs.adversarial_weight:
            parts[JUDGE] = self.payoff(judgement)
            weights[JUDGE] = float(knobs.adversarial_weight * knobs.adversarial_scale * knobs.adversarial_gate)
        total = self.combination(parts, weights, scores.applies, rollout.k) if parts else scores.total
        total = total - self.truncated_penalty * rollout.truncated.float()
        rewards = torch.zeros_like(rollout.logprobs)
        if len(rollout):
            rewards[torch.arange(len(rollout)), rollout.mask.sum(-1) - 1] = total
        if knobs.kl_penalty:
            rewards = rewards - knobs.kl_penalty * (rollout.logprobs - scores.reference_logprobs) * rollout.mask
        return Earnings(rewards, judgement.sampled, knobs.baseline, self._values(rollout, batch))

    @torch.no_grad()
    def _values(self, rollout: Rollout, batch: PromptBatch) -> Tensor | None:
        """(N, T) of the value head before the update."""
        if self.value_head is None or len(rollout) == 0:
            return None
        tree = grow_scored(batch.prompt_ids, {SAMPLED: _by_prompt(rollout.answer_ids, rollout.k, len(batch))})
        branches = tree.branches[SAMPLED]
        with self.backbone.generator():
            return self._value(self.backbone.hidden(tree)[branches.row[:, None], branches.parents])

    def _value(self, states: Tensor) -> Tensor:
        """(N, T, H) → (N, T)."""
        assert self.value_head is not None
        values: Tensor = self.value_head(states.float()).squeeze(-1)
        return values

    def credit(self, rollout: Rollout, earnings: Earnings) -> Credit:
        """Advantages of the sampled tokens; none where nothing was sampled."""
        if len(rollout) == 0:
            return Credit(rollout.logprobs, {})
        if self.knobs.policy_weight:
            self._check_baseline()
        return self.advantage(rollout, earnings)

    def update_generator(
        self, rollout: Rollout, scores: Scores, judgement: Judgement, credit: Credit, batch: PromptBatch
    ) -> Learned:
        """Supervised loss on the targets and policy loss on the sampled answers, one forward and backward a step."""
        if GENERATOR in self.frozen:
            return Learned({})
        lesson = Lesson(batch, rollout, credit, scores.reference_logprobs)
        shown: list[dict[str, Tensor]] = []
        for prompts in self._parts(self._easiest(judgement, len(batch))):
            with self.backbone.generator():
                terms, metrics = self.generator_terms(lesson.of(prompts))
                if not any_of(bool(terms)):
                    return Learned({})
                shown.append(metrics)
                if any_of(bool(metrics.get("policy/moved", torch.zeros(())) > self.policy_loss.target_kl)):
                    break
                terms = terms or {"nothing": 0 * self.backbone.parameters_of(GENERATOR)[0].sum()}  # others have some
                self._optimize(GENERATOR, terms)
                metrics["loss/generator"] = torch.stack(list(terms.values())).sum()
        metrics = {name: torch.stack([m[name] for m in shown if name in m]).mean() for m in shown for name in m}
        if self.knobs.policy_weight and self.policy_loss.epochs * self.policy_loss.minibatches > 1:
            metrics["policy/updates"] = torch.tensor(float(sum("loss/generator" in m for m in shown)))
            metrics["policy/moved"] = shown[-1]["policy/moved"]
        return Learned({name: value.detach() for name, value in metrics.items()})

    def generator_terms(self, lesson: Lesson) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weighted terms of the generator's loss, and what is worth logging about them."""
        weights, share = self._weights(lesson), self._shares(lesson)
        batch, rollout = lesson.batch, lesson.rollout
        branches: dict[str, list[list[Tensor]]] = {}
        if weights.keys() - {"supervised"}:
            branches[SAMPLED] = _by_prompt(rollout.answer_ids, rollout.k, len(batch))
        if "supervised" in weights:
            branches[TARGET] = _targets(batch)
        if not branches:
            return {}, {}
        predicted = self.backbone.predict(grow_scored(batch.prompt_ids, branches), {SAMPLED: self.sampling.temperature})
        losses = {name: self._losses[name](predicted, lesson) for name in weights}
        metrics = {name: value for term in losses.values() for name, value in term.metrics.items()}
        metrics |= {f"loss/{name}": term.loss.detach() for name, term in losses.items()}
        return {name: weight * share[name] * losses[name].loss for name, weight in weights.items()}, metrics

    def _weights(self, lesson: Lesson) -> dict[str, Tensor]:
        """The weights of the losses that count in this round."""
        weights = {name: getattr(self.knobs, knob) for name, knob in LOSS_KNOBS.items()}
        if not lesson.batch.answered:
            del weights["supervised"]
        if self.value_head is None or not self.knobs.policy_weight:
            del weights["value"]
        return {name: weight for name, weight in weights.items() if weight}

    def _shares(self, lesson: Lesson) -> dict[str, float]:
        """By loss, what the mean over this process's tokens weighs, so that all processes' tokens weigh the same."""
        batch, rollout = lesson.batch, lesson.rollout
        wanted = sum(len(batch.target_ids[b]) for b in batch.answered)
        target, sampled, answers = shares(wanted, int(self._counted(rollout).mask.sum()), len(rollout))
        return dict.fromkeys(LOSS_KNOBS, sampled) | {"supervised": target, "coupled": answers}

    @property
    def _losses(self) -> dict[str, Callable[[Mapping[str, Predicted], Lesson], LossTerm]]:
        return {
            "supervised": self._supervised_loss,
            "policy": self._policy_loss,
            "value": self._value_loss,
            "kl": self._kl_loss,
            "entropy": self._entropy_loss,
            "coupled": self._coupled_loss,
        }

    def _supervised_loss(self, predicted: Mapping[str, Predicted], lesson: Lesson) -> LossTerm:
        target = predicted[TARGET]
        return LossTerm(-masked_mean(target.logprobs, target.branches.mask), {})

    def _policy_loss(self, predicted: Mapping[str, Predicted], lesson: Lesson) -> LossTerm:
        logprobs = predicted[SAMPLED].logprobs
        policy = self.policy_loss(logprobs, self._counted(lesson.rollout), lesson.credit)
        return LossTerm(policy.loss, {**policy.metrics, "policy/moved": moved_kl(logprobs, lesson.rollout)})

    def _value_loss(self, predicted: Mapping[str, Predicted], lesson: Lesson) -> LossTerm:
        values = self._value(predicted[SAMPLED].states)
        return LossTerm(value_loss(values, self._counted(lesson.rollout), lesson.credit, self.value_clip), {})

    def _kl_loss(self, predicted: Mapping[str, Predicted], lesson: Lesson) -> LossTerm:
        counted = self._counted(lesson.rollout)
        return LossTerm(kl_loss(predicted[SAMPLED].logprobs, counted, lesson.reference_logprobs), {})

    def _entropy_loss(self, predicted: Mapping[str, Predicted], lesson: Lesson) -> LossTerm:
        return LossTerm(-masked_mean(predicted[SAMPLED].entropy, self._counted(lesson.rollout).mask), {})

    def _coupled_loss(self, predicted: Mapping[str, Predicted], lesson: Lesson) -> LossTerm:
        judge = self.discriminator.judge
        return LossTerm(self.coupling(self.backbone, judge, predicted[SAMPLED], lesson.rollout, lesson.batch), {})

    def _counted(self, rollout: Rollout) -> Rollout:
        """The answers with those masked that shall not count."""
        if not self.mask_truncated:
            return rollout
        return replace(rollout, mask=rollout.mask & ~rollout.truncated[:, None])

    def _easiest(self, judgement: Judgement, prompts: int) -> list[int]:
        """The prompts to learn from: those with the best judged answers, as many as the knob ``easiest_share`` says."""
        share = float(self.knobs.easiest_share)
        if share >= 1 or not self.judging:
            return list(range(prompts))
        kept = judgement.per_prompt.mean(1).argsort(descending=True)[: max(1, math.ceil(share * prompts))]
        return sorted(kept.tolist())

    def _parts(self, prompts: Sequence[int]) -> Iterator[list[int]]:
        """Which prompts each step of this round learns from."""
        epochs, minibatches = self.policy_loss.epochs, self.policy_loss.minibatches
        if not self.knobs.policy_weight:
            epochs = minibatches = 1
        for _ in range(epochs):
            if minibatches == 1:
                yield list(prompts)
            else:
                order = torch.randperm(len(prompts)).tensor_split(min(minibatches, len(prompts)))
                yield from ([prompts[i] for i in part.tolist()] for part in order)

    def report(
        self,
        rollout: Rollout,
        scores: Scores,
        earnings: Earnings,
        judgement: Judgement,
        credit: Credit,
        learned: Learned,
    ) -> dict[str, Tensor]:
        """Log the round once, the mean over the processes; callbacks read the same dictionary."""
        self.scores, self.judgement = scores, judgement
        metrics = {**learned.metrics, **judgement.metrics, **credit.metrics}
        metrics |= {f"knob/{name}": value.clone() for name, value in self.knobs.named_buffers()}
        if len(scores.target_total):
            metrics["reward/target"] = scores.target_total.mean()
        if len(rollout):
            metrics |= {f"reward/{name}": masked_mean(x, scores.applies[name]) for name, x in scores.parts.items()}
            metrics["reward/total"] = earnings.per_answer.mean()
            metrics["policy/kl"] = masked_mean(kl_k3(rollout.logprobs, scores.reference_logprobs), rollout.mask)
            metrics["policy/entropy"] = -masked_mean(rollout.logprobs, rollout.mask)
            metrics["policy/length"] = rollout.mask.sum(-1).float().mean()
            metrics["policy/truncated"] = rollout.truncated.float().mean()
        if self.payoff.needs_opponent and self.judging:
            metrics["reward/win"] = self.payoff(judgement).mean()
        metrics = mean_of_all(metrics)
        self.log_round(metrics)
        return metrics

    def log_round(self, metrics: Mapping[str, Tensor]) -> None:
        """Log what a round reported, the totals in the progress bar, too."""
        shown = {name for name in metrics if name in ("reward/total", "loss/generator", "loss/discriminator")}
        self.log_dict({name: metrics[name] for name in shown}, prog_bar=True, batch_size=1)
        self.log_dict({name: value for name, value in metrics.items() if name not in shown}, batch_size=1)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Keep how long a phase of the round took."""
        begun = perf_counter()
        yield
        self.phase_seconds[phase] = perf_counter() - begun

    # optimization

    def configure_optimizers(self) -> Any:
        parameters = {
            GENERATOR: self.backbone.parameters_of(GENERATOR)
            + list(self.value_head.parameters() if self.value_head else ()),
            DISCRIMINATOR: self.discriminator.judge.learned(self.backbone),
        }
        self.stepped: set[str] = set()
        optimizers = {player: make(parameters[player]) for player, make in self.optimizer_factories.items()}
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
        self.stepped.add(player)

    def _step_schedulers(self) -> None:
        """Once a round for each player that took a step."""
        for player in self.stepped:
            if (schedule := self.schedule_of(player)) is not None:
                schedule.step()
        self.stepped.clear()

    def schedule_of(self, player: str) -> Any:
        """The schedule of a player's learning rate, if any."""
        scheduled = [name for name, make in self.scheduler_factories.items() if make is not None]
        return self.trainer.lr_scheduler_configs[scheduled.index(player)].scheduler if player in scheduled else None

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip one player's gradient; Lightning calls this after fp16 gradients are unscaled and before the step."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.gradient_clip)
        if not norm.isfinite() and self.trainer.precision != "16-mixed":  # fp16 skips such steps and lowers its scale
            raise NonFiniteError(self._stopped(f"the gradient's norm is {norm.item()}"))

    def _stopped(self, what: str) -> str:
        return (
            f"{what} in round {self.trainer.global_step}; the step was not taken. "
            f"Lower the learning rate or check the rewards; last good checkpoint: {self._last_good}"
        )

    @property
    def _last_good(self) -> str:
        """Where the best checkpoint lies."""
        return getattr(self.trainer.checkpoint_callback, "best_model_path", "") or "none yet"

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
        perplexity = (-masked_row_mean(scores.base_logprobs, rollout.mask)).exp()
        return Answered(batch.examples, rollout.texts, rollout.truncated, scores.total, perplexity)


def _by_prompt(answers: Sequence[Tensor], k: int, prompts: int) -> list[list[Tensor]]:
    """The k answers of each prompt."""
    return [list(answers[b * k : (b + 1) * k]) for b in range(prompts)]


def _targets(batch: PromptBatch) -> list[list[Tensor]]:
    """The target of each prompt, or nothing where it has none."""
    answered = set(batch.answered)
    return [[target] if b in answered else [] for b, target in enumerate(batch.target_ids)]


def _at_least(bound: float, **settings: float) -> None:
    for name, value in settings.items():
        if value < bound:
            raise LoraGANError(f"{name} must be at least {bound}, got {value}")
