"""Rewards: what makes an answer good. Each gives one number an answer, higher is better."""

from lora_gan.rewards.base import Reward, RewardSum, weighted_sum
from lora_gan.rewards.function import FunctionReward
from lora_gan.rewards.perplexity import PerplexityReward
from lora_gan.rewards.semantic import SemanticReward

__all__ = ["FunctionReward", "PerplexityReward", "Reward", "RewardSum", "SemanticReward", "weighted_sum"]
