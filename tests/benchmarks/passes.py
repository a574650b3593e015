"""Tree against padded rows, and sampler against ``generate``: one backbone, one call each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_gan.backbone import Backbone
from lora_gan.sampling import Sampling, sample
from lora_gan.tree import grow_scored
from lora_gan.types import Rollout

from .setting import LORA, Size, generated, left_padded, make_items
from .timing import Comparison, compare


class Passes:
    """One model and its prompts; every method is one side of a comparison.

    Args:
        size: The shape.
        base: The folder of its model, or a backbone, on whose device the comparison runs.
    """

    def __init__(self, size: Size, base: Path | Backbone) -> None:
        self.size = size
        self.backbone = base if isinstance(base, Backbone) else Backbone(str(base), LORA, LORA)
        self.device = self.backbone.device
        items = make_items(size, self.backbone.tokenizer)
        self.prompts = [torch.tensor(item.prompt_ids, device=self.device) for item in items]
        generator = torch.Generator().manual_seed(2)
        shape = (size.prompts * size.num_generations, size.completion_tokens)
        drawn = torch.randint(0, len(self.backbone.tokenizer) - 1, shape, generator=generator)
        self.completions = drawn.to(self.device)
        self.padded, self.real = left_padded(self.prompts)
        for name, parameter in self.backbone.lm.named_parameters():
            if "lora_B" in name:  # zero at initialisation, which would leave half of the gradients zero
                torch.nn.init.normal_(parameter, std=0.02)

    def tree(self) -> Tensor:
        """Forward and backward of all completions as branches of their prompts."""
        k = self.size.num_generations
        by_prompt = [list(self.completions[b * k : (b + 1) * k]) for b in range(self.size.prompts)]
        with self.backbone.generator():
            logprobs = self.backbone.logprobs(grow_scored(self.prompts, {"sampled": by_prompt}))["sampled"]
            return self._backward(logprobs)

    def rows(self) -> Tensor:
        """The same with padded rows, each with its own copy of the prompt; head at the completions only."""
        mask = torch.cat(
            [self.real.repeat_interleave(self.size.num_generations, 0), torch.ones_like(self.completions)], 1
        )
        with self.backbone.generator():
            logits = self.backbone.causal_lm(
                input_ids=torch.cat([self.padded.repeat_interleave(self.size.num_generations, 0), self.completions], 1),
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                logits_to_keep=self.size.completion_tokens + 1,
                use_cache=False,
            ).logits[:, :-1]
            losses = cross_entropy(logits.flatten(0, 1), self.completions.flatten(), reduction="none")
            return self._backward(-losses.view_as(self.completions))

    def sampler(self, top_p: float) -> Rollout:
        """k completions for each prompt, with their log-probabilities."""
        with self.backbone.generator():
            return sample(self.backbone, self.prompts, self.size.num_generations, self._sampling(top_p))

    @torch.no_grad()
    def generate(self, top_p: float) -> Tensor:
        """The same by transformers, without log-probabilities."""
        with self.backbone.generator():
            return generated(
                self.backbone, self.padded, self.real, self.size.completion_tokens, self.size.num_generations, top_p
            )

    def _sampling(self, top_p: float) -> Sampling:
        return Sampling(max_new_tokens=self.size.completion_tokens, top_p=top_p)

    def _backward(self, logprobs: Tensor) -> Tensor:
        """Back-propagate a loss; returns the gradient as one vector."""
        parameters = self.backbone.parameters_of("generator")
        (logprobs * self._weights()).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        for parameter in parameters:
            parameter.grad = None
        return gradient

    def _weights(self) -> Tensor:
        """A different advantage for each completion, so that no two can be confused."""
        return torch.linspace(-1, 1, len(self.completions), device=self.device)[:, None] / self.completions.numel()


def compare_passes(size: Size, folder: Path, repeats: int, wanted: Sequence[str]) -> Iterator[Comparison]:
    """Tree against rows and sampler against ``generate``, as chosen by ``wanted``."""
    side = Passes(size, folder)
    if "tree" in wanted:
        yield compare(size.name, "tree, forward + backward", "padded rows", side.tree, side.rows, 1.8, repeats)
    for top_p in (1.0, 0.9) if "sampler" in wanted else ():
        what = f"sampler, top-p {top_p:g}"
        ours, theirs = partial(side.sampler, top_p), partial(side.generate, top_p)
        yield compare(size.name, what, "`generate`", ours, theirs, 1.6, repeats)
