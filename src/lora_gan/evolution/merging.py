"""Merge of trained adapters, with coefficients that CMA-ES finds; nothing is trained by gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_gan.backbone import GENERATOR
from lora_gan.checkpointing.adapters import adapter_factors
from lora_gan.errors import LoraGANError
from lora_gan.evolution.evaluating import EvaluatingModule, fitness_metrics
from lora_gan.evolution.lowrank import Factors, Singular, Weights, padded, singulars, total
from lora_gan.evolution.noise import seeded
from lora_gan.evolution.population import (
    member_loaded,
    read_weights,
    weights_from,
    weights_state,
    write_weights,
)
from lora_gan.lightning_compat import is_fitting
from lora_gan.step_callback import OUTPUT
from lora_gan.types import EvalOutput, PromptBatch, StepOutput

STATE = "merge"  # in checkpoints


class MergeModule(EvaluatingModule):
    """The generator is Σ cᵢ·ΔWᵢ of trained adapters, as in LoRAHub (arXiv 2307.13269).

    CMA-ES (Hansen 2016, arXiv 1604.00772; library ``cma``) searches the coefficients c for the fitness, from the
    uniform average on. A generation is one training step; its members complete the same prompts in one decode. The
    generator that is validated, saved and exported is the merge by the mean of the search. A test also measures each
    adapter alone and other merges, so it shows whether the search was worth it.

    The merge is exact where ``generator.lora.rank`` is at least the sum of the adapters' ranks. With a smaller rank it
    is the best approximation, in the evaluation as well.

    Args:
        adapters: Folders of at least two adapters in PEFT's format, of the same base and targets; ranks may differ.
        population: Coefficient vectors of a generation.
        sigma: Standard deviation of the coefficients in the first generation; CMA-ES adapts it.
        **settings: Those of the evaluation (evaluation, evaluation_prompts, workers, …) and of LoraGANModule.

    Raises:
        LoraGANError: Settings are out of range, or ``start`` is set, which the adapters are.
    """

    refinement_steps = 0
    schedules_follow_refinements = False

    def __init__(self, adapters: list[str], population: int = 8, sigma: float = 0.3, **settings: Any) -> None:
        if settings.get("start") is not None:
            raise LoraGANError("MergeModule starts from its adapters: leave start out")
        super().__init__(**settings)
        if len(adapters) < 2:
            raise LoraGANError(f"a merge needs at least two adapters, got {adapters}: set adapters to their folders")
        if population < 2 or not 0 < sigma < float("inf"):
            raise LoraGANError(f"need population >= 2 and sigma > 0, got {population} and {sigma}")
        self.folders = adapters
        self.size = population
        self.sigma = sigma
        self.parts: list[Weights] = []  # of the adapters
        self.history: list[list[float]] = []  # fitness by generation and member
        self.others: dict[str, Weights] = {}  # in a test, by the name of their column
        self.search: Any = None  # cma.CMAEvolutionStrategy

    # the search

    def asked(self) -> list[Any]:
        """The coefficients of this generation's members, (K,) each."""
        found: list[Any] = self.search.ask()
        return found

    def merged(self, coefficients: Sequence[float]) -> Weights:
        """Σ cᵢ·ΔWᵢ in the generator's rank and scale."""
        like = read_weights(self.backbone)
        sums = {name: total([part[name] for part in self.parts], coefficients) for name in like}
        if any(sums[name].rank > x.rank for name, x in like.items()):
            found = singulars(sums)
            return {name: found[name].factors(x) for name, x in like.items()}
        return {name: padded(sums[name], x) for name, x in like.items()}

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, StepOutput]:
        """One generation: ask for coefficients, evaluate their merges, report their fitness to the search."""
        self.begin_step(batch)
        with self.optimization.counted():
            asked = self.asked()
            with self._timed("evaluate"):
                evaluations = self.evaluated([self.merged(c) for c in asked], batch)
            fitness = torch.tensor(evaluations.fitness, dtype=torch.float64)
            with self._timed("update"):
                self._tell(asked, fitness.tolist())
                write_weights(self.backbone, self.merged(self.search.mean))
            self.generation += 1
            metrics = {**fitness_metrics(fitness), **self._search_metrics()}
            self.log_step(metrics)
            return {OUTPUT: StepOutput(metrics, evaluations.rollout, None, None, dict(self._seconds))}

    def _tell(self, asked: Sequence[Any], fitness: Sequence[float]) -> None:
        if len(set(fitness)) > 1:  # it would rank equal ones by their order, and drift
            self.search.tell(asked, [-x for x in fitness])  # it minimises
        self.history.append(list(fitness))

    def _search_metrics(self) -> dict[str, Tensor]:
        values = {f"merge/coefficient_{i}": c for i, c in enumerate(self.search.mean, start=1)}
        return {name: torch.tensor(float(x)) for name, x in {**values, "merge/sigma": self.search.sigma}.items()}

    def _new_search(self) -> Any:
        """The search before its first generation; its random numbers are its own, not NumPy's."""
        try:
            import cma
        except ImportError as error:
            raise LoraGANError("MergeModule searches by CMA-ES: pip install cma") from error
        import numpy as np

        rng = np.random.default_rng(int(seeded(self.evolution_seed, "merge").initial_seed()))
        quiet = {"verbose": -9}  # nothing is printed or written
        own = {"seed": float("nan"), "randn": lambda *shape: rng.standard_normal(shape)}
        k = len(self.folders)
        average = [1 / k] * k
        return cma.CMAEvolutionStrategy(average, self.sigma, {"popsize": self.size, **quiet, **own})

    # start and resume

    def on_fit_start(self) -> None:
        """Read the adapters, and begin the search or repeat it up to the checkpoint from the fitness of its members."""
        super().on_fit_start()
        self._read()
        self.search = self._new_search()
        history, self.history = self.history, []
        for fitness in history:
            self._tell(self.asked(), fitness)
        if not history:
            write_weights(self.backbone, self.merged(self.search.mean))

    def _read(self) -> None:
        if not self.parts:
            self.parts = [adapter_weights(self, folder) for folder in self.folders]
        # a checkpoint is loaded before the module is moved to its device
        self.parts = [weights_from(weights_state(x), self.device) for x in self.parts]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the adapters, so that their folders may go, and the fitness of all members."""
        super().on_save_checkpoint(checkpoint)
        adapters = [weights_state(x) for x in self.parts]
        checkpoint["lora_gan"][STATE] = {"adapters": adapters, "history": self.history, "search": self.of_search()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load them."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["lora_gan"].get(STATE)
        if state is None and is_fitting(self):
            raise LoraGANError("the checkpoint is not one of a merge; list its adapter among adapters instead")
        if state is None:
            return
        if is_fitting(self):
            self.check_search(state["search"])
        self.parts = [weights_from(x, self.device) for x in state["adapters"]]
        self.history = state["history"]
        self.generation = len(self.history)

    def of_search(self) -> dict[str, Any]:
        return {"adapters": len(self.folders), "population": self.size, "sigma": self.sigma, **super().of_search()}

    # test

    def on_test_start(self) -> None:
        """Make the merges that are measured beside the searched one, once for all batches."""
        super().on_test_start()
        self._read()
        self.others = dict(self.alternatives())

    def on_test_end(self) -> None:
        """Forget them."""
        super().on_test_end()
        self.others = {}

    def test_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, EvalOutput]:
        """As in every test; and each adapter alone, and merges without a search."""
        outputs = super().test_step(batch, batch_idx)
        for role, weights in self.others.items():
            with member_loaded(self.backbone, weights), self.backbone.generator():
                outputs[role] = self.complete(batch, self.greedy)
        return outputs

    def alternatives(self) -> Iterator[tuple[str, Weights]]:
        """Each adapter alone, the uniform average, the sum, TIES and DARE, by the name of their column in a test."""
        k = len(self.parts)
        for i in range(k):
            yield f"adapter_{i + 1}", self.merged([float(i == j) for j in range(k)])
        yield "merge_average", self.merged([1 / k] * k)
        yield "merge_sum", self.merged([1.0] * k)
        yield "merge_TIES", self.merged_by("ties")
        yield "merge_DARE", self.merged_by("dare_ties")

    def merged_by(self, method: str, density: float = 0.5) -> Weights:
        """TIES (arXiv 2306.01708) or DARE with TIES (arXiv 2311.03099) of PEFT on the ΔWᵢ, each with weight 1.

        Args:
            method: ``"ties"`` or ``"dare_ties"``.
            density: Share of the elements of each ΔWᵢ that are kept.
        """
        from peft.utils import merge_utils

        function, ones = getattr(merge_utils, method), torch.ones(len(self.parts), device=self.device)
        devices = [self.device] if self.device.type == "cuda" else []
        found = {}
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.evolution_seed)
            for name, like in read_weights(self.backbone).items():
                delta = function([part[name].delta.float() for part in self.parts], ones, density)
                found[name] = Singular(*torch.linalg.svd(delta.double(), full_matrices=False)).factors(like)
        return found


def adapter_weights(module: EvaluatingModule, folder: str) -> Weights:
    """The factors of an adapter of any rank in a folder, by module.

    Raises:
        LoraGANError: As :func:`lora_gan.checkpointing.adapters.load_adapter`, but for the rank.
    """
    found = adapter_factors(module.backbone, GENERATOR, folder)
    return {name: Factors(a.to(module.device), b.to(module.device), scale) for name, (a, b, scale) in found.items()}
