"""Engines: what samples the completions of a training step.

By default it is this process, in one batch (:mod:`lora_gan.sampling`). An engine of another library computes with other
kernels, so its policy is not quite the one that learns: its log-probabilities are kept, the importance ratios that
follow have a limit, and ``policy/mismatch_kl`` shows the difference.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from lora_gan.backbone import GENERATOR, Backbone
from lora_gan.checkpointing.adapters import save_adapter
from lora_gan.errors import LoraGANError
from lora_gan.program import errors_alone
from lora_gan.sampling import Sampling, eos_ids, gather, sample
from lora_gan.types import Rollout

SEEDS = 2**31
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of vLLM's buffers for adapters


class Engine(ABC):
    """Samples completions in the generator's mode."""

    exact = False  # True: with the policy that learns, but for rounding

    def check(self, backbone: Backbone, how: Sampling) -> None:
        """Refuse what the engine cannot do; the module calls it before training.

        Raises:
            LoraGANError: The sampling has a setting that only this process can follow.
        """
        plain = Sampling(how.max_new_tokens, how.temperature, merge_lora=how.merge_lora, cuda_graphs=how.cuda_graphs)
        if how != plain:
            raise LoraGANError(
                f"{type(self).__name__} samples with temperature and max_new_tokens alone: leave out the other "
                "settings of sampling, or the engine"
            )

    @abstractmethod
    def __call__(self, backbone: Backbone, prompts: Sequence[Tensor], k: int, how: Sampling) -> Rollout:
        """k completions for each of B prompts (P,), with the log-probabilities by which they were drawn."""


class InProcess(Engine):
    """This process: :func:`lora_gan.sampling.sample`."""

    exact = True

    def check(self, backbone: Backbone, how: Sampling) -> None:
        pass

    def __call__(self, backbone: Backbone, prompts: Sequence[Tensor], k: int, how: Sampling) -> Rollout:
        return sample(backbone, prompts, k, how)


class ContinuousBatching(Engine):
    """Continuous batching of transformers: a completion that ends makes room for the next one, in paged memory.

    For many completions of very different lengths on a GPU. On a CPU it works and is slower than this process.

    Args:
        num_blocks: Blocks of its cache, each of ``page_size`` tokens; null takes what the GPU's memory holds, so a CPU
            needs a number.
        max_batch_tokens: Tokens that it computes at a time; null, as above.
        page_size: Tokens of a block.
        max_memory_percent: Share of the free memory of a GPU that its cache may take.
    """

    def __init__(
        self,
        num_blocks: int | None = None,
        max_batch_tokens: int | None = None,
        page_size: int = 256,
        max_memory_percent: float = 0.5,
    ) -> None:
        self.settings = {
            "num_blocks": num_blocks,
            "max_batch_tokens": max_batch_tokens,
            "page_size": page_size,
            "max_memory_percent": max_memory_percent,
        }

    def check(self, backbone: Backbone, how: Sampling) -> None:
        super().check(backbone, how)
        if not hasattr(backbone.causal_lm, "generate_batch"):
            raise LoraGANError(f"{type(backbone.causal_lm).__name__} has no continuous batching; leave the engine out")

    def __call__(self, backbone: Backbone, prompts: Sequence[Tensor], k: int, how: Sampling) -> Rollout:
        from transformers import ContinuousBatchingConfig

        seed, device = int(torch.randint(SEEDS, ())), prompts[0].device
        settings = ContinuousBatchingConfig(
            return_logprobs=True, seed=seed, use_async_batching=False, use_cuda_graph=False, **self.settings
        )
        ends = eos_ids(backbone)
        generation = GenerationConfig(
            max_new_tokens=how.max_new_tokens,
            do_sample=True,
            temperature=how.temperature,
            top_k=0,
            top_p=1.0,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
        texts = [prompt.tolist() for prompt in prompts for _ in range(k)]
        with torch.random.fork_rng([device] if device.type == "cuda" else []), errors_alone("transformers"):
            found = backbone.causal_lm.generate_batch(
                inputs=texts, generation_config=generation, continuous_batching_config=settings, warmup=False
            )
        failed = [result.error for result in found.values() if result.error is not None]
        if failed or len(found) != len(texts):
            raise LoraGANError(
                f"continuous batching gave {len(found) - len(failed)} of {len(texts)} completions"
                f"{f' ({failed[0]})' if failed else ''}; raise num_blocks and max_batch_tokens, or leave the engine out"
            )
        drawn = [(result.generated_tokens, result.logprobs) for result in found.values()]
        return rollout_of(backbone, drawn, k, how, device)


class Vllm(Engine):
    """vLLM on the same GPU, with the generator's adapter written to a folder and loaded anew in each step.

    Not yet run: it needs a GPU. The base is a second time in memory, in vLLM. Needs ``pip install vllm``.

    Args:
        gpu_memory_utilization: Share of the GPU's memory that vLLM may take, weights included.
        max_model_len: Most tokens of a prompt and its completion; null takes the model's.
        settings: Further arguments of ``vllm.LLM``.
    """

    def __init__(
        self,
        gpu_memory_utilization: float = 0.4,
        max_model_len: int | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.gpu_memory_utilization = gpu_memory_utilization
        self.max_model_len = max_model_len
        self.settings = settings or {}
        self._model: Any = None
        self._folder: TemporaryDirectory[str] | None = None
        self._loaded = 0  # adapters so far

    def check(self, backbone: Backbone, how: Sampling) -> None:
        super().check(backbone, how)
        if find_spec("vllm") is None:
            raise LoraGANError("the engine Vllm needs the package vllm and a GPU: pip install vllm, or leave it out")
        lora = backbone.generator_lora
        if lora.use_dora or lora.rank > RANKS[-1]:
            raise LoraGANError(
                f"vLLM loads adapters without DoRA, of a rank up to {RANKS[-1]}; got rank {lora.rank} and use_dora "
                f"{lora.use_dora}: change generator.lora, or leave the engine out"
            )

    def __call__(self, backbone: Backbone, prompts: Sequence[Tensor], k: int, how: Sampling) -> Rollout:
        from vllm import SamplingParams

        ends, seeds = eos_ids(backbone), torch.randint(SEEDS, (len(prompts),)).tolist()
        settings = [
            SamplingParams(
                n=k,
                temperature=how.temperature,
                max_tokens=how.max_new_tokens,
                logprobs=0,  # of the drawn token alone
                seed=seed,  # of another prompt it would draw by the same random numbers
                stop_token_ids=ends,
                detokenize=False,
            )
            for seed in seeds
        ]
        model = self._opened(backbone)
        asked = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
        found = model.generate(asked, settings, use_tqdm=False, lora_request=self._adapter(backbone))
        drawn = [
            (list(one.token_ids), [at[token].logprob for token, at in zip(one.token_ids, one.logprobs, strict=True)])
            for result in found
            for one in result.outputs
        ]
        return rollout_of(backbone, drawn, k, how, prompts[0].device)

    def _opened(self, backbone: Backbone) -> Any:
        if self._model is None:
            from vllm import LLM

            self._folder = TemporaryDirectory(prefix="lora_gan_vllm_")
            self._model = LLM(
                model=backbone.causal_lm.name_or_path,
                enable_lora=True,
                max_lora_rank=next(rank for rank in RANKS if rank >= backbone.generator_lora.rank),
                max_loras=1,
                gpu_memory_utilization=self.gpu_memory_utilization,
                max_model_len=self.max_model_len,
                logprobs_mode="processed_logprobs",  # at the sampling temperature
                **self.settings,
            )
        return self._model

    def _adapter(self, backbone: Backbone) -> Any:
        """The generator's adapter as it is now, under a new number: vLLM keeps what it has loaded under an old one."""
        from vllm.lora.request import LoRARequest

        assert self._folder is not None
        self._loaded += 1
        folder = Path(self._folder.name) / str(self._loaded)
        save_adapter(backbone, GENERATOR, folder)
        shutil.rmtree(folder.with_name(str(self._loaded - 1)), ignore_errors=True)
        return LoRARequest(f"generator-{self._loaded}", self._loaded, str(folder))


def rollout_of(
    backbone: Backbone,
    drawn: Sequence[tuple[Sequence[int], Sequence[float]]],
    k: int,
    how: Sampling,
    device: torch.device,
) -> Rollout:
    """N completions, given as tokens and their log-probabilities, up to the first token that ends them.

    A token without a text, from a row of the embedding that no token has, ends a completion, too, as EOS.
    """
    eos, ending = backbone.tokenizer.eos_token_id, set(eos_ids(backbone))
    ids = torch.zeros(len(drawn), how.max_new_tokens, dtype=torch.long)
    logprobs = torch.zeros(ids.shape)
    ends = torch.full((len(drawn),), how.max_new_tokens)
    finished = torch.zeros(len(drawn), dtype=torch.bool)
    for row, (tokens, values) in enumerate(drawn):
        known = [token if token < backbone.vocabulary else eos for token in tokens]
        last = next((t for t, token in enumerate(known) if token in ending), None)
        length = len(known) if last is None else last + 1
        ids[row, :length] = torch.tensor(known[:length])
        logprobs[row, :length] = torch.tensor(values[:length])
        ends[row], finished[row] = length, last is not None
    return gather(backbone, ids.to(device), logprobs.to(device), ends.to(device), finished.to(device), k)
