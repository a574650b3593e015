"""Evolution of LoRA weights: a population of generators on one frozen base."""

from lora_gan.evolution.module import EvolutionModule
from lora_gan.evolution.operators import (
    Crossover,
    ElementWise,
    FixedNoise,
    FromStart,
    GaussianMutation,
    MergeCoefficients,
    MixUpdates,
    Mutation,
    RankOneMutation,
    SingularValueMutation,
    SwapModules,
)
from lora_gan.evolution.ray_workers import RayWorkers
from lora_gan.evolution.selection import FitnessProportional, Selection, Tournament, Truncation
from lora_gan.evolution.start import AsItIs, SavedAdapters, Start, SupervisedStart

__all__ = [
    "AsItIs",
    "Crossover",
    "ElementWise",
    "EvolutionModule",
    "FitnessProportional",
    "FixedNoise",
    "FromStart",
    "GaussianMutation",
    "MergeCoefficients",
    "MixUpdates",
    "Mutation",
    "RankOneMutation",
    "RayWorkers",
    "SavedAdapters",
    "Selection",
    "SingularValueMutation",
    "Start",
    "SupervisedStart",
    "SwapModules",
    "Tournament",
    "Truncation",
]
