"""LoraGANModule: one training step, readable from top to bottom in ``training_step``.

Nothing flows back inside a step. What crosses steps is a handful of named coefficients: callbacks set them, the step
reads them. A new variant is a new class behind a seam (reward, objective, advantage, policy loss), never a branch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from lora_gan.advantages import AdvantageEstimator, MovingAverage
from lora_gan.backbone import DISCRIMINATOR, GENERATOR, Backbone, BackboneSettings
from lora_gan.baseline import MovingAverageBaseline
from lora_gan.best_of import without_answers
from lora_gan.checkpointing.adapters import load_role
from lora_gan.coefficients import Changes, Coefficients, CoefficientState
from lora_gan.discriminator import Discriminator, DiscriminatorSettings
from lora_gan.discriminator.objectives import SAMPLED, TARGET
from lora_gan.distributed import mean_of_all
from lora_gan.dynamic_sampling import Scored, replace_uninformative
from lora_gan.engines import Engine, InProcess
from lora_gan.errors import LoraGANError
from lora_gan.evaluation import Evaluated
from lora_gan.final_answer import FinalAnswer, find_answer
from lora_gan.generator import Generator, GeneratorSettings, easiest
from lora_gan.lightning_compat import forget_logged, is_fitting
from lora_gan.optimization import Optimization, OptimizationSettings
from lora_gan.policy import ActivePolicy
from lora_gan.rewards import (
    AdversarialReward,
    Logit,
    Reward,
    RewardAggregation,
    WeightedSum,
    default_rewards,
    weighted_sum,
    weights_of,
)
from lora_gan.rewards.base import ADVERSARIAL, check_names
from lora_gan.sampling import Sampling, sample
from lora_gan.step_callback import OUTPUT, StepCallback
from lora_gan.step_metrics import adversarial_metrics, own_metrics, step_metrics
from lora_gan.teacher import Teacher
from lora_gan.tensors import join
from lora_gan.tree import grow_parts
from lora_gan.types import (
    REWARD,
    Advantages,
    DiscriminatorScores,
    Minibatch,
    PromptBatch,
    RewardContext,
    Rollout,
    Scores,
    StepOutput,
    TokenRewards,
    require_prompts,
)

SEEDS = 2**32  # how many there are, of torch, numpy and python alike
REFERENCES = ("base", "snapshot")
COEFFICIENT = "coefficient/"


class LoraGANModule(Evaluated):
    """Two LoRA adapters on one frozen causal language model: a generator that answers, a discriminator that scores.

    The modes of the field are coefficients: supervised only (``policy`` 0), policy gradient only (``supervised`` 0),
    both (the default).

    Args:
        base: The frozen model: "builtin", any hub id, or a local folder of a causal language model.
        backbone: How it is loaded.
        num_generations: Completions sampled for each prompt in a step.
        sampling: How they are sampled.
        engine: What samples them in a training step; by default this process.
        rewards: What makes a completion good; by default 0.7 semantic similarity + 0.3 perplexity.
        aggregation: How the rewards and the adversarial reward become the policy's reward; by default a weighted sum.
        adversarial_reward: How the discriminator's score becomes a reward; by default it is the score itself.
        truncated_penalty: Subtracted from the reward of a completion that the length limit cut off.
        advantage: What a completion's reward is compared with; by default a moving average of rewards.
        kl_reference: Towards what the KL terms pull: "base", or "snapshot", the generator as it was when a callback
            took a snapshot, or a teacher (on-policy distillation).
        coefficients: Weights of the losses and of the adversarial reward.
        generator: The generator's losses, adapter and optimizer.
        discriminator: The discriminator's architecture, objective, adapter and optimizer.
        optimization: Gradient clipping, and how many prompts a pass takes.
        final_answer: How rewards, metrics and chat find the final answer in a completion; by default the whole
            completion is the answer.
        best_of: Completions that a test samples for each prompt, to choose one by agreement, likelihood, discriminator
            and reward, each a column of its table; 1 leaves them out.
        dynamic_sampling: How often in a step of the policy gradient other training prompts are drawn in place of those
            whose completions all get the same rewards, which teach it nothing (DAPO, arXiv 2503.14476). The step learns
            from what is found, targets included. Where the adversarial reward counts, nothing is replaced.
    """

    def __init__(
        self,
        base: str = "builtin",
        backbone: BackboneSettings = BackboneSettings(),
        num_generations: int = 4,
        sampling: Sampling = Sampling(),
        engine: Engine | None = None,
        rewards: list[Reward] | None = None,
        aggregation: RewardAggregation | None = None,
        adversarial_reward: AdversarialReward | None = None,
        truncated_penalty: float = 0.0,
        advantage: AdvantageEstimator | None = None,
        kl_reference: str | Teacher = "base",
        coefficients: Coefficients = Coefficients(),
        generator: GeneratorSettings = GeneratorSettings(),
        discriminator: DiscriminatorSettings = DiscriminatorSettings(),
        optimization: OptimizationSettings = OptimizationSettings(),
        final_answer: FinalAnswer | None = None,
        best_of: int = 1,
        dynamic_sampling: int = 0,
    ) -> None:
        super().__init__()
        if num_generations < 1:
            raise LoraGANError(f"num_generations must be at least 1, got {num_generations}")
        if best_of < 1:
            raise LoraGANError(f"best_of must be at least 1, got {best_of}")
        if dynamic_sampling < 0 or (dynamic_sampling and num_generations < 2):
            raise LoraGANError(
                f"dynamic_sampling must be at least 0, and needs num_generations of at least 2; got {dynamic_sampling} "
                f"and {num_generations}"
            )
        if not math.isfinite(truncated_penalty):
            raise LoraGANError(f"truncated_penalty must be a finite number, got {truncated_penalty}")
        if isinstance(kl_reference, str) and kl_reference not in REFERENCES:
            raise LoraGANError(
                f"kl_reference must be {' or '.join(REFERENCES)} or the class of a teacher, got {kl_reference!r}"
            )
        self.automatic_optimization = False
        self.base = base
        self.num_generations = num_generations
        self.sampling = sampling
        self.engine = engine or InProcess()
        self.greedy = replace(sampling, do_sample=False, num_beams=1, base=None)
        self.rewards = default_rewards() if rewards is None else rewards
        check_names(self.rewards)
        self.aggregation = aggregation or WeightedSum()
        self.adversarial_reward = adversarial_reward or Logit()
        self.truncated_penalty = truncated_penalty
        self.final_answer = final_answer
        self.best_of = best_of
        self.dynamic_sampling = dynamic_sampling
        self.advantage = advantage or MovingAverage()
        self.kl_reference = kl_reference
        self.configured_coefficients = coefficients
        self.optimization = Optimization(self, {GENERATOR: generator, DISCRIMINATOR: discriminator}, optimization)
        self.backbone = Backbone(base, generator.lora, discriminator.lora, backbone)
        self.discriminator = Discriminator(discriminator)
        self.discriminator.model.build(self.backbone)
        values = self.backbone.hidden_size if self.advantage.needs_values else 0
        self.generator = Generator(
            generator,
            values,
            sampling.temperature,
            sampling.max_new_tokens,
            exact=sampling.base is None and self.engine.exact,
        )
        for role, adapter in ((GENERATOR, generator.adapter), (DISCRIMINATOR, discriminator.adapter)):
            if adapter is not None:
                load_role(self, role, adapter)
        start = self.backbone.parameters_of(GENERATOR) if generator.adapter is not None else []
        self.starting_adapter = [parameter.detach().clone() for parameter in start]  # at the start of the run
        self.coefficients = CoefficientState(coefficients)
        self._changes = Changes()
        self.frozen: frozenset[str] = frozenset()  # roles that take part and do not learn
        self._seconds: dict[str, float] = {}  # by phase of this step
        self._check_parts()

    def _check_parts(self) -> None:
        self.engine.check(self.backbone, self.sampling)
        if isinstance(self.kl_reference, Teacher):
            self.kl_reference.check(self.backbone)
        self.aggregation.check([reward.name for reward in self.rewards])
        for reward in self.rewards:
            reward.check(self.final_answer)
        parts: list[AdvantageEstimator | RewardAggregation | Reward] = [self.advantage, self.aggregation, *self.rewards]
        for part in parts:
            if part.needs_group and self.num_generations < 2:
                raise LoraGANError(
                    f"{type(part).__name__} compares a prompt's completions: num_generations must be at least 2; "
                    f"got {self.num_generations}"
                )
        if self.rewards and all(reward.may_skip for reward in self.rewards) and not self.advantage.needs_group:
            raise LoraGANError(
                f"a completion that {self.rewards[0].name!r} leaves out has no reward, and "
                f"{type(self.advantage).__name__} would take that for a reward of 0: set on_failure: error, or choose "
                "LeaveOneOut or GroupNormalised"
            )
        if self.dynamic_sampling and not self.advantage.needs_group:
            raise LoraGANError(
                "dynamic_sampling replaces prompts whose completions get equal rewards, and "
                f"{type(self.advantage).__name__} learns from them, too: set it to 0, or choose LeaveOneOut or "
                "GroupNormalised"
            )
        if self.adversarial_reward.needs_comparison and not self.discriminator.model.compares:
            raise LoraGANError(
                f"{type(self.adversarial_reward).__name__} needs a discriminator that compares a completion with its "
                f"target, such as PairwiseDiscriminator; {type(self.discriminator.model).__name__} does not: choose "
                "another discriminator, or another adversarial_reward"
            )
        if self.configured_coefficients.coupled and not self.discriminator.model.differentiable:
            raise LoraGANError(
                "coefficients.coupled needs a differentiable discriminator, such as AdapterDiscriminator that reads "
                f"PromptAndCompletion; {type(self.discriminator.model).__name__} that reads "
                f"{type(self.discriminator.model.input_format).__name__} is none: set coefficients.coupled to 0, and "
                "coefficients.adversarial to use its score as a reward"
            )

    def configure_callbacks(self) -> list[L.Callback]:
        """The moving-average baseline, where the advantage needs it and no callback of the trainer sets one."""
        if is_fitting(self):
            self.optimization.check_trainer()
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        given = any(isinstance(callback, StepCallback) and callback.sets_baseline for callback in callbacks)
        return [MovingAverageBaseline()] if self.advantage.needs_baseline and not given else []

    # the step

    @property
    def discriminator_active(self) -> bool:
        """Whether the discriminator takes part in this step: it learns, or its scores are used."""
        now = self.coefficients
        wanted = self.advantage.needs_discriminator and now.policy
        return bool(now.discriminator_updates or now.adversarial or now.coupled or wanted)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, StepOutput]:
        """One step: sample, score, update the discriminator, compute advantages, update the generator."""
        self.begin_step(batch)
        with self.optimization.counted():
            output = self.run_step(batch)
            self.log_step(output.metrics)
            return {OUTPUT: output}

    def begin_step(self, batch: PromptBatch) -> None:
        """Check the batch, seed the step, and begin its times."""
        require_prompts(batch)
        self.seed_step()
        self._seconds = {}

    def run_step(self, batch: PromptBatch) -> StepOutput:
        """The step itself; the caller begins, counts and logs it."""
        with self._timed("sample"):
            rollout = self.sample_rollout(batch)
        early = self._scores_meanwhile(rollout, batch)
        with self._timed("score"), self.backbone.generator():
            scored = self._scored(batch, rollout)
        with self._timed("sample"):
            scored, replaced = self.replace_uninformative(scored)
        batch, rollout, scores = scored.batch, scored.rollout, scored.scores
        disc_scores = early or self._discriminator_scores(rollout, scores, batch)
        with self._timed("generator"):
            rewards = self.compute_rewards(rollout, scores, disc_scores, batch)
            advantages = self.compute_advantages(rollout, rewards)
            learned = self.update_generator(rollout, scores, disc_scores, advantages, batch)
        optimized = self.optimization.metrics()
        self.optimization.step_schedulers()
        metrics = {
            **learned,
            **advantages.metrics,
            **step_metrics(rollout, scores, rewards),
            **own_metrics(self.rewards),
            **replaced,
            **adversarial_metrics(disc_scores, self.adversarial_reward),
            **optimized,
            **{COEFFICIENT + name: value.clone() for name, value in self.coefficients.named_buffers()},
        }
        return StepOutput(mean_of_all(metrics), rollout, scores, disc_scores, dict(self._seconds), batch)

    def _scores_meanwhile(self, rollout: Rollout, batch: PromptBatch) -> DiscriminatorScores | None:
        """What the discriminator does while rewards are computed in the background; None: it comes after them."""
        if not len(rollout) or not any(reward.in_background for reward in self.rewards):
            return None
        for reward in self.rewards:
            reward.start(rollout.texts, batch, rollout.num_generations)
            if self.discriminator_active:
                targets = batch.of(batch.with_target)
                reward.start(targets.targets, targets, 1)
        if self.discriminator.objective.needs_rewards or self.dynamic_sampling:
            return None
        return self._discriminator_scores(rollout, Scores.unknown(len(rollout), batch, self.device), batch)

    def _discriminator_scores(self, rollout: Rollout, scores: Scores, batch: PromptBatch) -> DiscriminatorScores | None:
        """The discriminator's part of a step."""
        with self._timed("sample"):
            opponent = self.sample_opponent(batch)
        with self._timed("discriminator"):
            return self.update_discriminator(rollout, opponent, scores, batch)

    def sample_rollout(self, batch: PromptBatch) -> Rollout:
        """Completions for each prompt, no gradient; none in a step that has no use for them."""
        now = self.coefficients
        judged = self.discriminator_active and self.discriminator.settings.samples
        if not (now.policy or now.kl or now.entropy or now.coupled or judged):
            return Rollout.empty(self.device)
        with self.backbone.generator():
            return self.engine(self.backbone, batch.prompt_ids, self.num_generations, self.sampling)

    def sample_opponent(self, batch: PromptBatch) -> Rollout:
        """Completions of the generator's last snapshot, where the adversarial reward compares with them."""
        if not (self.adversarial_reward.needs_opponent and self.discriminator_active):
            return Rollout.empty(self.device)
        with self.backbone.snapshot():
            return sample(self.backbone, batch.prompt_ids, self.num_generations, self.sampling)

    def replace_uninformative(self, scored: Scored) -> tuple[Scored, dict[str, Tensor]]:
        """The prompts to learn from: see ``dynamic_sampling``; and what is logged of it."""
        now = self.coefficients
        if not (self.dynamic_sampling and now.policy and self._counted) or now.adversarial:
            return scored, {}
        return replace_uninformative(scored, self._other_prompts, self.dynamic_sampling)

    def _other_prompts(self, count: int) -> Scored:
        """Training prompts, drawn at random, with completions and rewards."""
        batch = self.trainer.datamodule.draw(count).to(self.device)  # type: ignore[attr-defined]
        rollout = self.sample_rollout(batch)
        with self.backbone.generator():
            return self._scored(batch, rollout)

    def _scored(self, batch: PromptBatch, rollout: Rollout) -> Scored:
        scores = self.score(rollout, batch, with_targets=self.discriminator_active)
        return Scored(batch, rollout, scores, self._counted)

    @property
    def _counted(self) -> tuple[str, ...]:
        """The names of the rewards that have a weight."""
        return tuple(reward.name for reward in self.rewards if reward.weight)

    def score(self, rollout: Rollout, batch: PromptBatch, with_targets: bool) -> Scores:
        """Rewards of the completions and, if wanted, of the targets; the reference pass happens here.

        The active mode is that of the model which wrote the completions.
        """
        targets = batch.of(batch.with_target) if with_targets else PromptBatch.empty()
        wanted = batch.targets_by_prompt if with_targets else [[] for _ in range(len(batch))]
        branches = {SAMPLED: rollout.by_prompt(len(batch)), TARGET: wanted}
        parts = self.optimization.parts(len(batch))
        trees = grow_parts(batch.prompt_ids, branches, parts)
        temperature = {SAMPLED: self.sampling.temperature}
        with self.backbone.reference():
            base, reference = self.backbone.logprobs_at(trees, {}, temperature)
        if self.kl_reference == "snapshot":
            with self.backbone.snapshot():
                (reference,) = self.backbone.logprobs_at(trees, temperature)
        elif isinstance(self.kl_reference, Teacher):
            answered = {SAMPLED: branches[SAMPLED]}
            reference = self.kl_reference.logprobs(self.backbone, batch, answered, parts, temperature)
        mask = {kind: join([tree.branches[kind].mask for tree in trees]) for kind in branches}
        policy = ActivePolicy(self.backbone, self.optimization.parts)
        context = RewardContext(rollout.num_generations, base[SAMPLED], mask[SAMPLED], self.final_answer, policy)
        sampled = weighted_sum(self.rewards, rollout.texts, batch, context)
        context = RewardContext(1, base[TARGET], mask[TARGET], self.final_answer, policy)
        target = weighted_sum(self.rewards, targets.targets, targets, context)
        return Scores(
            sampled.total,
            sampled.parts,
            sampled.applies,
            target.total,
            target.parts,
            target.applies,
            reference[SAMPLED],
            base[SAMPLED],
        )

    def update_discriminator(
        self, rollout: Rollout, opponent: Rollout, scores: Scores, batch: PromptBatch
    ) -> DiscriminatorScores | None:
        """The discriminator scores the fresh completions, then learns from them; None in a step without it."""
        if not self.discriminator_active:
            return None
        now = self.coefficients
        learns = DISCRIMINATOR not in self.frozen
        updates = int(learns * now.discriminator_updates * now.discriminator_gate)
        found = self.discriminator.update(self.backbone, batch, rollout, opponent, scores, updates, self.optimization)
        return replace(found, answers=tuple(find_answer(text, self.final_answer) for text in rollout.texts))

    def compute_rewards(
        self, rollout: Rollout, scores: Scores, disc_scores: DiscriminatorScores | None, batch: PromptBatch
    ) -> TokenRewards:
        """The policy's rewards: the total, adversarial part included, at the last token, the KL penalty at each."""
        now = self.coefficients
        parts, weights = dict(scores.parts), weights_of(self.rewards)
        if now.adversarial and disc_scores is not None:
            parts[ADVERSARIAL] = self.adversarial_reward(disc_scores)
            weights[ADVERSARIAL] = float(now.adversarial * now.adversarial_scale * now.adversarial_gate)
        total, adversarial = self._total(parts, weights, scores, rollout.num_generations), None
        if ADVERSARIAL in parts:
            adversarial = total - self._total(dict(scores.parts), weights, scores, rollout.num_generations)
        total = total - self.truncated_penalty * rollout.truncated.float()
        rewards = torch.zeros_like(rollout.logprobs)
        if len(rollout):
            rewards[torch.arange(len(rollout)), rollout.mask.sum(-1) - 1] = total
        if now.kl_penalty:
            rewards = rewards - now.kl_penalty * (rollout.logprobs - scores.reference_logprobs) * rollout.mask
        predicted = None if disc_scores is None else disc_scores.sampled
        values = self.generator.values(self.backbone, rollout, batch, self.optimization)
        return TokenRewards(rewards, predicted, now.baseline, values, adversarial)

    def _total(self, parts: Mapping[str, Tensor], weights: Mapping[str, float], scores: Scores, k: int) -> Tensor:
        """The parts in one number, (N,)."""
        return self.aggregation(parts, weights, scores.applies, k) if parts else scores.total

    def compute_advantages(self, rollout: Rollout, rewards: TokenRewards) -> Advantages:
        """Advantages of the sampled tokens; none where nothing was sampled."""
        return self.advantage(rollout, rewards) if len(rollout) else Advantages(rollout.logprobs, {})

    def update_generator(
        self,
        rollout: Rollout,
        scores: Scores,
        disc_scores: DiscriminatorScores | None,
        advantages: Advantages,
        batch: PromptBatch,
    ) -> dict[str, Tensor]:
        """The generator learns from targets and advantages; metrics, none where it does not learn."""
        if GENERATOR in self.frozen:
            return {}
        prompts, share = list(range(len(batch))), float(self.coefficients.easiest_share)
        if share < 1 and disc_scores is not None:
            prompts = easiest(disc_scores.per_prompt, share)
        minibatch = Minibatch(batch, rollout, advantages, scores.reference_logprobs)
        model, now = self.discriminator.model, self.coefficients
        return self.generator.update(self.backbone, minibatch, prompts, now, model, self.optimization)

    def preferences(self, batch: PromptBatch, rollout: Rollout) -> dict[str, Tensor]:
        found = super().preferences(batch, rollout)
        if self.discriminator.can_judge(self.backbone):
            asked, parts = without_answers(batch), self.optimization.parts(len(batch))
            found["discriminator"] = self.discriminator.judge(self.backbone, asked, rollout, parts)
        return found

    def log_step(self, metrics: Mapping[str, Tensor]) -> None:
        """Log what a step reported, the totals in the progress bar, too, and coefficients when they change."""
        shown = {name for name in metrics if name in (REWARD, "loss/generator", "loss/discriminator")}
        coefficients = {name for name in metrics if name.startswith(COEFFICIENT)}
        forget_logged(self.trainer, "training_step")
        self.log_dict({name: metrics[name] for name in shown}, prog_bar=True, batch_size=1)
        others = metrics.keys() - shown - coefficients
        self.log_dict({name: value for name, value in metrics.items() if name in others}, batch_size=1)
        self.log("step", float(self.trainer.global_step + 1), batch_size=1)  # where loggers put all of these
        self._log_coefficients({name.removeprefix(COEFFICIENT): metrics[name] for name in coefficients})

    def _log_coefficients(self, found: dict[str, Tensor]) -> None:
        """Those that changed, past Lightning's collection, which has one step for all."""
        step, every = self.trainer.global_step + 1, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not found or not self._changes.due(step, every):
            return
        values = {n: float(x) for n, x in sorted(found.items()) if n != "value" or self.advantage.needs_values}
        for when, changed in self._changes.points(values, step):
            for sink in self.trainer.loggers:
                sink.log_metrics({COEFFICIENT + name: value for name, value in changed.items()}, when)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Keep how long a phase of the step took."""
        begun = self.clock()
        yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + self.clock() - begun

    # optimization

    def configure_optimizers(self) -> Any:
        generator, discriminator = self.generator.trainable(self.backbone), self.discriminator.trainable(self.backbone)
        return self.optimization.configure({GENERATOR: generator, DISCRIMINATOR: discriminator})

    def on_train_start(self) -> None:
        self.optimization.check_schedules()
        for reward in self.rewards:
            reward.prepare()
        if self.dynamic_sampling and not hasattr(self.trainer.datamodule, "draw"):  # type: ignore[attr-defined]
            raise LoraGANError(
                "dynamic_sampling draws other prompts from an InstructionDataModule, and this run has none: set "
                "dynamic_sampling to 0"
            )
        bare: int = getattr(self.trainer.datamodule, "bare_prompts", 0)  # type: ignore[attr-defined]
        if bare and self.adversarial_reward.needs_target:
            raise LoraGANError(
                f"{type(self.adversarial_reward).__name__} needs a target for each prompt, and {bare:,} training "
                "examples have none: leave them out, or choose another adversarial_reward"
            )

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.optimization.clip(optimizer)

    def on_validation_epoch_end(self) -> None:
        """Before checkpoints are written, so that they hold what a schedule made of the metrics."""
        if is_fitting(self) and not self.trainer.sanity_checking:
            self.optimization.follow_metrics(self.trainer.callback_metrics)
