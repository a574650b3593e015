"""Evolution callbacks: adapters of the fittest members, and a plot of fitness and diversity."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from lora_gan.atomic import atomic_folder
from lora_gan.backbone import GENERATOR
from lora_gan.callbacks.last_checkpoint import run_folder
from lora_gan.checkpointing.adapters import keep_newest, save_adapter
from lora_gan.errors import LoraGANError
from lora_gan.evolution import EvolutionModule
from lora_gan.evolution.population import CROSSED, MUTATED, REFINED, START, member_loaded, positions
from lora_gan.step_callback import StepCallback, StepModule
from lora_gan.types import PromptBatch, StepOutput

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {START: "grey", MUTATED: "tab:blue", CROSSED: "tab:green", REFINED: "tab:red", "elite": "black"}


class _OfEvolution(StepCallback):
    """Refuses another module before the training."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == TrainerFn.FITTING:
            _evolution_module(pl_module, self)


class FittestMembers(_OfEvolution):
    """Saves the fittest members as PEFT adapters in ``checkpoints/gen-<generation>/<rank>`` of the run's folder.

    ``member.json`` in an adapter's folder holds its fitness, origin and id. The folders can be the ``start`` of another
    run (:class:`~lora_gan.evolution.SavedAdapters`).

    Args:
        every_n_generations: Generations between two saves.
        members: Number of fittest members to save.
        keep_last: Generations to keep; 0 keeps all.
    """

    def __init__(self, every_n_generations: int = 5, members: int = 1, keep_last: int = 3) -> None:
        if every_n_generations < 1 or members < 1 or keep_last < 0:
            raise LoraGANError(
                "need every_n_generations >= 1, members >= 1 and keep_last >= 0, got "
                f"{every_n_generations}, {members} and {keep_last}"
            )
        self.every_n_generations = every_n_generations
        self.members = members
        self.keep_last = keep_last

    def after_step(self, trainer: L.Trainer, module: StepModule, output: StepOutput, batch: PromptBatch) -> None:
        if trainer.global_step % self.every_n_generations:
            return
        evolution = _evolution_module(module, self)
        folder = run_folder(trainer) / "checkpoints" / f"gen-{trainer.global_step}"
        with atomic_folder(folder) as fresh:
            for rank, member in enumerate(evolution.ranked[: self.members], start=1):
                with member_loaded(module.backbone, member.weights):
                    save_adapter(module.backbone, GENERATOR, fresh / str(rank))
                record = {"fitness": member.fitness, "origin": member.kind, "id": member.id}
                (fresh / str(rank) / "member.json").write_text(json.dumps(record), encoding="utf-8")
        keep_newest(folder.parent, "gen-", self.keep_last)


@dataclass
class Generation:
    """Data of one generation for the plot."""

    number: int
    fitness: list[float]  # of each member
    kinds: list[str]  # origin of each, or "elite"
    diversity: float
    held_out: float | None = None  # fitness of the best member on held-out prompts, if validated

    @property
    def mean(self) -> float:
        return sum(self.fitness) / len(self.fitness)


class FitnessPlot(_OfEvolution):
    """Plots fitness and diversity over generations to ``fitness.png`` in the run's folder and to TensorBoard.

    Args:
        every_n_generations: Generations between two plots; the last generation is always plotted.
    """

    def __init__(self, every_n_generations: int = 5) -> None:
        if every_n_generations < 1:
            raise LoraGANError(f"every_n_generations must be at least 1, got {every_n_generations}")
        self.every_n_generations = every_n_generations
        self.history: list[Generation] = []

    def after_step(self, trainer: L.Trainer, module: StepModule, output: StepOutput, batch: PromptBatch) -> None:
        members = _evolution_module(module, self).ranked
        self.history.append(
            Generation(
                trainer.global_step,
                [member.fitness for member in members],
                [member.kind for member in members],
                float(output.metrics["population/diversity"]),
            )
        )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or not self.history:
            return
        held_out = trainer.callback_metrics.get("fitness/held_out")
        self.history[-1].held_out = None if held_out is None else float(held_out)
        if trainer.global_step % self.every_n_generations == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.history:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        figure = draw_figure(self.history, _evolution_module(module, self))
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / "fitness.png", dpi=120)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("evolution", figure, trainer.global_step, close=False)

    def state_dict(self) -> dict[str, Any]:
        return {"history": [asdict(generation) for generation in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [Generation(**generation) for generation in state_dict["history"]]


def draw_figure(history: list[Generation], module: EvolutionModule) -> Figure:
    """Fitness and diversity over generations, and the positions of the last generation's members."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), layout="constrained")
    fitness, spread, plane = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    _draw_fitness(fitness, history)
    spread.plot([g.number for g in history], [g.diversity for g in history], color="black", marker=".")
    spread.set(xlabel="generation", ylabel="mean distance of two members (rms of ΔW)", ylim=(0, None))
    _draw_positions(plane, module)
    for axes in (fitness, spread):
        axes.locator_params(axis="x", integer=True)
    return figure


def _draw_fitness(axes: Axes, history: list[Generation]) -> None:
    for kind, colour in COLOURS.items():
        dots = [(g.number, f) for g in history for f, k in zip(g.fitness, g.kinds, strict=True) if k == kind]
        if dots:
            numbers, fitness = zip(*dots, strict=True)
            axes.scatter(numbers, fitness, s=12, color=colour, label=kind, alpha=0.6)
    lines: Mapping[str, tuple[list[float | None], str]] = {
        "best": ([max(g.fitness) for g in history], "-"),
        "mean": ([g.mean for g in history], "--"),
        "best, held out": ([g.held_out for g in history], ":"),
    }
    for name, (values, style) in lines.items():
        points = [(g.number, value) for g, value in zip(history, values, strict=True) if value is not None]
        if points:
            numbers, fitness = zip(*points, strict=True)
            axes.plot(numbers, fitness, style, color="black", label=name)
    axes.set(xlabel="generation", ylabel="fitness")
    axes.legend(fontsize="small", ncols=2)


def _draw_positions(axes: Axes, module: EvolutionModule) -> None:
    x, y = positions(module.ranked).unbind(1)
    fitness = torch.tensor([member.fitness for member in module.ranked])
    dots = axes.scatter(x.tolist(), y.tolist(), c=fitness.tolist())
    axes.figure.colorbar(dots, label="fitness")
    axes.set(xlabel="positions of the members' ΔW in a plane")
    axes.ticklabel_format(scilimits=(0, 0))
    axes.locator_params(nbins=4)
    axes.set_aspect("equal", adjustable="datalim")


def _evolution_module(module: L.LightningModule, callback: L.Callback) -> EvolutionModule:
    if not isinstance(module, EvolutionModule):
        raise LoraGANError(
            f"{type(callback).__name__} needs a lora_gan.evolution.EvolutionModule, got a {type(module).__name__}: "
            "remove the callback or change the model"
        )
    return module
