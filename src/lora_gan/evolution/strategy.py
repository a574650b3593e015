"""Evolution strategy over the generator's LoRA weights: one mean, and members that are made from seeds.

The estimator is that of Salimans et al. (arXiv 1703.03864), which fine-tunes language models without backpropagation
(arXiv 2509.24372); rank-one noise is that of EGGROLL (arXiv 2511.16652). P is the number of members.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_gan.backbone import GENERATOR
from lora_gan.errors import LoraGANError
from lora_gan.evolution.evaluating import EvaluatingModule, fitness_metrics
from lora_gan.evolution.lowrank import Weights
from lora_gan.evolution.noise import MEAN, FullNoise, Noise, Perturbed, shifted
from lora_gan.evolution.population import Member, lora_layers, read_weights, write_weights
from lora_gan.lightning_compat import is_fitting
from lora_gan.step_callback import OUTPUT
from lora_gan.types import PromptBatch, StepOutput

STATE = "evolution_strategy"  # in checkpoints


class Sigma(ABC):
    """Size σ of the noise and how it adapts.

    Args:
        sigma: In the first generation, the standard deviation of the change of an element of A or B.
    """

    compares_mean = False  # whether the mean is evaluated as well

    def __init__(self, sigma: float = 0.02) -> None:
        if not 0 < sigma < math.inf:
            raise LoraGANError(f"sigma must be a finite number > 0, got {sigma}")
        self.sigma = sigma

    @abstractmethod
    def following(self, sigma: float, fitness: Tensor, of_mean: float | None) -> float:
        """σ of the next generation.

        Args:
            sigma: That of this one.
            fitness: (P,) that of its members.
            of_mean: That of their mean, if :attr:`compares_mean`.
        """


class ConstantSigma(Sigma):
    """The same σ in all generations."""

    def following(self, sigma: float, fitness: Tensor, of_mean: float | None) -> float:
        return sigma


class DecayingSigma(Sigma):
    """σ falls by a factor in each generation, down to a smallest one.

    Args:
        sigma: As in :class:`Sigma`.
        decay: Factor from one generation to the next, in (0, 1].
        least: Smallest σ.
    """

    def __init__(self, sigma: float = 0.02, decay: float = 0.98, least: float = 0.001) -> None:
        super().__init__(sigma)
        if not 0 < decay <= 1 or not 0 < least <= sigma:
            raise LoraGANError(f"need decay in (0, 1] and 0 < least <= sigma, got {decay}, {least} and {sigma}")
        self.decay = decay
        self.least = least

    def following(self, sigma: float, fitness: Tensor, of_mean: float | None) -> float:
        return max(sigma * self.decay, self.least)


class SuccessRule(Sigma):
    """σ grows while many members are fitter than their mean, and falls while few are (Rechenberg 1973).

    σ ← σ·exp(rate·(p − target)/(1 − target)), as in Igel et al. 2007 (Evolutionary Computation 15(1)), with the share p
    of the members that are fitter than the mean, of which one that is equally fit counts half. Where the fitness is
    linear, one member of each pair is fitter, so σ grows up to the size at which it is not. The mean is one more member
    to evaluate.

    Args:
        sigma: As in :class:`Sigma`.
        target: Share of fitter members at which σ stays, in (0, 1).
        rate: Speed of the adaptation.
        least: Smallest σ.
        most: Largest σ.
    """

    compares_mean = True

    def __init__(
        self, sigma: float = 0.02, target: float = 0.2, rate: float = 0.3, least: float = 0.001, most: float = 0.2
    ) -> None:
        super().__init__(sigma)
        if not 0 < target < 1 or not rate > 0 or not 0 < least <= sigma <= most:
            raise LoraGANError(
                f"need target in (0, 1), rate > 0 and 0 < least <= sigma <= most, got {target}, {rate} and {least}, "
                f"{sigma}, {most}"
            )
        self.target = target
        self.rate = rate
        self.least = least
        self.most = most

    def following(self, sigma: float, fitness: Tensor, of_mean: float | None) -> float:
        assert of_mean is not None
        fitter = float((fitness > of_mean).double().mean() + 0.5 * (fitness == of_mean).double().mean())
        factor = math.exp(self.rate * (fitter - self.target) / (1 - self.target))
        return min(max(sigma * factor, self.least), self.most)


def centred_ranks(fitness: Tensor) -> Tensor:
    """(P,) → (P,) ranks from −1/2, the least fit, to 1/2; equal ones share the mean of theirs."""
    below = (fitness[:, None] > fitness).sum(1)
    equal = (fitness[:, None] == fitness).sum(1)
    ranks = below + (equal - 1) / 2
    return (ranks / (len(fitness) - 1) - 0.5).double()


def gradient(population: Perturbed, fitness: Tensor) -> Weights:
    """g = 1/(P·σ) Σ shapedᵢ·εᵢ over all members; one ε exists at a time."""
    shaped = centred_ranks(fitness)
    shares = (shaped[0::2] - shaped[1::2]) / (len(fitness) * population.sigma)
    total: Weights = {
        name: replace(x, a=torch.zeros_like(x.a), b=torch.zeros_like(x.b)) for name, x in population.mean.items()
    }
    for pair, share in enumerate(shares.tolist()):
        if share:
            total = shifted(total, population.direction(pair), share)
    return total


class EvolutionStrategy(EvaluatingModule):
    """Evolution strategy: the generator's weights are the mean, which follows an estimated gradient of the fitness.

    A generation is one training step. Its members are the mean ± noise, made from seeds, so neither the run nor its
    checkpoints hold them; all complete the same prompts with the same random numbers. ``generator.optimizer`` takes the
    step, after ``optimization.max_grad_norm`` has clipped the gradient. ``members_at_once`` bounds the members that
    exist at a time. The generator that is validated, saved and exported is the mean.

    Args:
        population: Number of members, even.
        sigma: Size of the noise; by default constant.
        noise: What is added to the mean; by default independent noise on A and B.
        refinement_steps: Policy-gradient steps of the mean after each generation, with an optimizer state of their own;
            the prompts of the generation are split among them. 0: none.
        **settings: Those of the evaluation (start, evaluation, members_at_once, workers, …) and of LoraGANModule.

    Raises:
        LoraGANError: Settings are out of range.
    """

    def __init__(
        self,
        population: int = 16,
        sigma: Sigma | None = None,
        noise: Noise | None = None,
        refinement_steps: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if population < 2 or population % 2:
            raise LoraGANError(
                f"population must be even and at least 2, because members are pairs mean ± noise, got {population}"
            )
        if refinement_steps < 0:
            raise LoraGANError(f"refinement_steps must be at least 0, got {refinement_steps}")
        self.size = population
        self.adaptation = sigma or ConstantSigma()
        self.sigma = self.adaptation.sigma
        self.noise = noise or FullNoise()
        self.refinement_steps = refinement_steps
        self.refinement_state: dict[str, Any] = {}  # of the refinement's optimizer and schedule
        self.schedules_follow_refinements = refinement_steps > 0

    def perturbed(self) -> Perturbed:
        """The members of this generation; the mean is the first, if it is evaluated as well."""
        mean = read_weights(self.backbone)
        members = range(MEAN if self.adaptation.compares_mean else 0, self.size)
        return Perturbed(mean, self.noise, self.sigma, self.evolution_seed, self.generation, members)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, StepOutput]:
        """One generation: evaluate the members, step along the gradient, refine the mean."""
        self.begin_step(batch)
        with self.optimization.counted():
            population = self.perturbed()
            with self._timed("evaluate"):
                evaluations = self.evaluated(population, batch)
            found = list(evaluations.fitness)
            of_mean = found.pop(0) if self.adaptation.compares_mean else None
            fitness = torch.tensor(found, dtype=torch.float64)
            with self._timed("update"):
                metrics = self._ascend(gradient(population, fitness))
            metrics |= {**fitness_metrics(fitness), "es/sigma": torch.tensor(self.sigma)}
            if of_mean is not None:
                metrics["fitness/of_mean"] = torch.tensor(of_mean)
            last = StepOutput({}, evaluations.rollout, None, None, {})
            if self.refinement_steps:
                last = self._refine_mean(batch)
            self.sigma = self.adaptation.following(self.sigma, fitness, of_mean)
            self.generation += 1
            metrics = {**last.metrics, **metrics}
            self.log_step(metrics)
            return {OUTPUT: replace(last, metrics=metrics, seconds=dict(self._seconds))}

    def _ascend(self, g: Weights) -> dict[str, Tensor]:
        """One optimizer step along ``g``: the loss −⟨weights, g⟩ has the gradient −g in all precisions."""
        layers = lora_layers(self.backbone)
        with self.backbone.generator():
            products = [
                (layer.lora_A[GENERATOR].weight * g[name].a).sum() + (layer.lora_B[GENERATOR].weight * g[name].b).sum()
                for name, layer in layers.items()
            ]
            self.optimization.backward(GENERATOR, {"fitness": -torch.stack(products).sum()})
            self.optimization.step(GENERATOR)
        norm = torch.stack([w.double().square().sum() for x in g.values() for w in (x.a, x.b)]).sum().sqrt()
        metrics = self.optimization.metrics()
        self.optimization.step_schedulers()
        return {**metrics, "es/grad_norm": norm.float()}

    def _refine_mean(self, batch: PromptBatch) -> StepOutput:
        own = self.optimizer_state(GENERATOR)
        mean = Member(read_weights(self.backbone), optimizer_state=self.refinement_state)
        (refined,) = self.refine([mean], batch)
        write_weights(self.backbone, refined.member.weights)
        self.refinement_state = dict(refined.member.optimizer_state)
        self.load_optimizer_state(GENERATOR, own)
        return refined.output

    # start and resume

    def on_train_start(self) -> None:
        """Make the mean, or restore the state of the checkpoint."""
        super().on_train_start()
        if self.resumed:
            self.generation, self.sigma = self.resumed["generation"], self.resumed["sigma"]
            self.refinement_state = self.resumed["refinement"]
            self.resumed = {}
        elif self.generation == 0:
            batches = self.trainer.train_dataloader
            assert batches is not None
            write_weights(self.backbone, self.start(self.backbone, batches, 1)[0])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what is not the mean or its optimizer; the noise follows from the seed."""
        super().on_save_checkpoint(checkpoint)
        state = {"generation": self.generation, "sigma": self.sigma, "refinement": self.refinement_state}
        checkpoint["lora_gan"][STATE] = {**state, "search": self.of_search()}

    def of_search(self) -> dict[str, Any]:
        how = {
            "sigma": f"{self.adaptation.sigma} ({type(self.adaptation).__name__})",
            "noise": type(self.noise).__name__,
        }
        return {"population": self.size, **how, **super().of_search()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load it if training is resumed."""
        super().on_load_checkpoint(checkpoint)
        if not is_fitting(self):
            return
        if STATE not in checkpoint["lora_gan"]:
            raise LoraGANError(
                "the checkpoint is not one of an evolution strategy; to start from its adapter, set start: "
                "{class_path: lora_gan.evolution.SavedAdapters, init_args: {folders: [<run>/adapters/generator]}}"
            )
        self.resumed = checkpoint["lora_gan"][STATE]
        self.check_search(self.resumed["search"])
