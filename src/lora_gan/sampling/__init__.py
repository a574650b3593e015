"""Sampling: how completions are drawn."""

from lora_gan.sampling.choice import choose, draw_uniform
from lora_gan.sampling.sampler import end_turns, eos_ids, gather, prepare, sample
from lora_gan.sampling.settings import Sampling

__all__ = ["Sampling", "choose", "draw_uniform", "end_turns", "eos_ids", "gather", "prepare", "sample"]
