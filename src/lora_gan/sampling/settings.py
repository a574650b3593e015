"""Settings of sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_gan.errors import LoraGANError

INT8 = "int8"


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling.

    Args:
        max_new_tokens: Length limit in tokens; a completion without EOS by then is truncated.
        temperature: Divides the logits; all log-probabilities are those of the divided logits.
        top_p: Draw from the smallest set of tokens with at least this mass. Below 1 the recorded log-probabilities
            are still over the whole vocabulary, so policy gradients are no longer exactly on-policy.
        top_k: Draw from the top_k most likely tokens; 0 is all.
        do_sample: Whether to sample; false takes the most likely token each time (greedy decoding).
        num_beams: Width of a beam search; 1 is none. Above 1 the completions are the best beams instead of samples, so
            they do not follow the policy's distribution, which the policy gradient assumes.
        base: "int8" samples a training step's completions with the base's linear layers in 8 bits, on a CPU with a
            float32 base: faster, from a policy that differs a little from the one that learns. So tokens are weighted
            by importance ratios up to the ``ratio_cap`` of the policy loss, by default 2. Null samples as it learns.
        merge_lora: Decode with a copy of the base's weights with the adapter merged in: faster, for the memory of the
            copy while completions are sampled. Null merges where it pays and the weights have 32 bits, since 16 round
            small updates away. Weights that bitsandbytes quantised are never merged.
        cuda_graphs: Replay each step of the decoding as a CUDA graph, on a GPU.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    do_sample: bool = True
    num_beams: int = 1
    base: str | None = None
    merge_lora: bool | None = None
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise LoraGANError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.num_beams < 1:
            raise LoraGANError(f"num_beams must be at least 1 (1 is no beam search), got {self.num_beams}")
        if not 0 < self.temperature < math.inf:
            raise LoraGANError(
                f"temperature must be > 0 and finite, got {self.temperature}; for greedy decoding set do_sample: false"
            )
        if not 0 < self.top_p <= 1:
            raise LoraGANError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise LoraGANError(f"top_k must be at least 0 (0 is the whole vocabulary), got {self.top_k}")
        if self.base not in (None, INT8):
            raise LoraGANError(f"sampling.base must be {INT8} or null, got {self.base!r}")
