"""Rewards: each gives one number per completion; higher is better."""

from lora_gan.rewards.adversarial import (
    AdversarialReward,
    AgainstTarget,
    GailReward,
    Logit,
    LogProbability,
    Payoff,
    Probability,
    WeightedVote,
    WinRate,
    WithoutLength,
)
from lora_gan.rewards.answer import AnswerReward, MathReward
from lora_gan.rewards.base import (
    AdversarialElsewhere,
    Guarded,
    NormalizeThenSum,
    Reward,
    RewardAggregation,
    RewardSum,
    WeightedSum,
    answers_of,
    references_of,
    weighted_sum,
    weights_of,
)
from lora_gan.rewards.code import CodeReward
from lora_gan.rewards.consistency import SelfConsistency, SemanticConsistency
from lora_gan.rewards.function import FunctionReward, SetReward
from lora_gan.rewards.judge import JudgeReward
from lora_gan.rewards.length import LengthReward, OverlongPenalty, RepetitionPenalty
from lora_gan.rewards.likelihood import ReferenceLikelihood
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
    "AdversarialElsewhere",
    "AdversarialReward",
    "AgainstTarget",
    "AnswerReward",
    "BleuReward",
    "ChrfReward",
    "CodeReward",
    "ContainsReward",
    "Entailment",
    "Evidence",
    "ExactReward",
    "FunctionReward",
    "GailReward",
    "Guarded",
    "JudgeReward",
    "LengthReward",
    "LogProbability",
    "Logit",
    "MathReward",
    "MeteorReward",
    "NormalizeThenSum",
    "OverlongPenalty",
    "Payoff",
    "PerplexityReward",
    "Probability",
    "ReferenceLikelihood",
    "RepetitionPenalty",
    "RetrievalReward",
    "Reward",
    "RewardAggregation",
    "RewardModel",
    "RewardSum",
    "RougeReward",
    "SelfConsistency",
    "SemanticConsistency",
    "SemanticReward",
    "SetReward",
    "TruthReward",
    "WeightedSum",
    "WeightedVote",
    "WinRate",
    "WithoutLength",
    "answers_of",
    "references_of",
    "weighted_sum",
    "weights_of",
]


def default_rewards() -> list[Reward]:
    """Those of a module that is given none: 0.7 semantic similarity + 0.3 perplexity."""
    return [SemanticReward(), PerplexityReward()]
