"""Evolution of LoRA weights: a population of generators on one frozen base."""

from lora_gan.evolution.merging import MergeModule
from lora_gan.evolution.module import EvolutionModule
from lora_gan.evolution.noise import FullNoise, Noise, RankOneNoise
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
from lora_gan.evolution.strategy import ConstantSigma, DecayingSigma, EvolutionStrategy, Sigma, SuccessRule

__all__ = [
    "AsItIs",
    "ConstantSigma",
    "Crossover",
    "DecayingSigma",
    "ElementWise",
    "EvolutionModule",
    "EvolutionStrategy",
    "FitnessProportional",
    "FixedNoise",
    "FromStart",
    "FullNoise",
    "GaussianMutation",
    "MergeCoefficients",
    "MergeModule",
    "MixUpdates",
    "Mutation",
    "Noise",
    "RankOneMutation",
    "RankOneNoise",
    "RayWorkers",
    "SavedAdapters",
    "Selection",
    "Sigma",
    "SingularValueMutation",
    "Start",
    "SuccessRule",
    "SupervisedStart",
    "SwapModules",
    "Tournament",
    "Truncation",
]
