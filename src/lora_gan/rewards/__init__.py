"""Rewards: what makes an answer good. Each gives one number an answer, higher is better."""

from lora_gan.rewards.base import (
    Combination,
    NormalisedSum,
    Reward,
    RewardSum,
    WeightedSum,
    references_of,
    weighted_sum,
    weights_of,
)
from lora_gan.rewards.consistency import SelfConsistency, SemanticConsistency
from lora_gan.rewards.form import LengthReward, RepetitionPenalty
from lora_gan.rewards.function import FunctionReward
from lora_gan.rewards.model import RewardModel
from lora_gan.rewards.overlap import (
    BleuReward,
    ChrfReward,
    ContainsReward,
    ExactReward,
    MeteorReward,
    RougeReward,
)
from lora_gan.rewards.perplexity import PerplexityReward
from lora_gan.rewards.retrieval import AddedWords, Entailment, Evidence, RetrievalReward
from lora_gan.rewards.semantic import SemanticReward
from lora_gan.rewards.truth import TruthReward

__all__ = [
    "AddedWords",
    "BleuReward",
    "ChrfReward",
    "Combination",
    "ContainsReward",
    "Entailment",
    "Evidence",
    "ExactReward",
    "FunctionReward",
    "LengthReward",
    "MeteorReward",
    "NormalisedSum",
    "PerplexityReward",
    "RepetitionPenalty",
    "RetrievalReward",
    "Reward",
    "RewardModel",
    "RewardSum",
    "RougeReward",
    "SelfConsistency",
    "SemanticConsistency",
    "SemanticReward",
    "TruthReward",
    "WeightedSum",
    "references_of",
    "weighted_sum",
    "weights_of",
]
