"""One frozen causal language model, two LoRA adapters on it, and the discriminator's head.

Which adapter is active is a *mode*; this class is its one owner. Forward, backward and step stay inside the mode::

    with backbone.generator():
        loss = -backbone.logprobs(tree)["target"].mean()
        loss.backward()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_gan.data.tokenizer import load_tokenizer
from lora_gan.errors import LoraGANError
from lora_gan.tensors import token_logprobs
from lora_gan.tree import PromptTree

GENERATOR, DISCRIMINATOR = "generator", "discriminator"
BUILTIN = "builtin"


@dataclass(frozen=True)
class LoraSettings:
    """Shape of one LoRA adapter (arXiv 2106.09685).

    Args:
        rank: Rank r of the update ΔW = (alpha / r)·B·A.
        alpha: Scale of the update; 2·rank is customary.
        targets: Modules that get an adapter: "all-linear" finds every linear layer but the head of any architecture;
            else a list of name endings, such as [c_attn, c_proj].
    """

    rank: int = 16
    alpha: int = 32
    targets: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise LoraGANError(f"LoRA rank must be at least 1, got {self.rank}")


@dataclass(frozen=True)
class _Pass:
    hidden: Tensor  # (B, L, H) last hidden states, as the head receives them
    logits: Tensor  # (n, V) at the places asked for


class Backbone(nn.Module):
    """The frozen base with its adapters ``generator`` and ``discriminator``.

    Args:
        base: "builtin", a hub id or a local folder of a causal language model.
        generator: LoRA settings of the generator.
        discriminator: LoRA settings of the discriminator.
        dtype: Number format of the frozen base's weights; adapters and head stay in float32.
    """

    def __init__(self, base: str, generator: LoraSettings, discriminator: LoraSettings, dtype: str = "float32") -> None:
        super().__init__()
        model = load_base(base, dtype)
        self.tokenizer = load_tokenizer(base)
        self.context_length: int = getattr(model.config, "max_position_embeddings", 1 << 30)
        settings = {GENERATOR: generator, DISCRIMINATOR: discriminator}
        self.lm: PeftModel = get_peft_model(model, _peft_config(model, generator), adapter_name=GENERATOR)
        self.lm.add_adapter(DISCRIMINATOR, _peft_config(model, settings[DISCRIMINATOR]))
        self.judge_head = nn.Linear(model.config.hidden_size, 1)
        self._layers = [m for m in self.lm.modules() if isinstance(m, BaseTunerLayer)]
        self._activate(None)
        self.train(False)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The base as transformers knows it, its linear layers wrapped by PEFT."""
        return self.lm.get_base_model()

    @property
    def device(self) -> torch.device:
        return self.judge_head.weight.device

    def train(self, mode: bool = True) -> Backbone:
        """Stays in evaluation mode: dropout would make log-probabilities irreproducible and ratios differ from 1."""
        return super().train(False)

    # modes

    @contextmanager
    def generator(self) -> Iterator[None]:
        """Answers come from the generator's adapter."""
        with self._mode(GENERATOR):
            yield

    @contextmanager
    def discriminator(self) -> Iterator[None]:
        """The discriminator's adapter judges."""
        with self._mode(DISCRIMINATOR):
            yield

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The base alone, adapters off, no gradient."""
        with self._mode(None), torch.no_grad():
            yield

    @contextmanager
    def _mode(self, adapter: str | None) -> Iterator[None]:
        previous = self._active
        self._activate(adapter)
        try:
            yield
        finally:
            self._activate(previous)

    def _activate(self, adapter: str | None) -> None:
        """PEFT turns gradients of inactive adapters off as it switches; here they stay on for both."""
        for layer in self._layers:
            if adapter is None:
                layer.enable_adapters(False)
            else:
                layer.enable_adapters(True)
                layer.set_adapter(adapter)
        for name, parameter in self.lm.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(True)
        self._active = adapter

    # passes

    def logprobs(self, tree: PromptTree, temperature: Mapping[str, float] | None = None) -> dict[str, Tensor]:
        """Log-probability of every branch token in the active mode, by kind: (M, T), 0 where masked.

        Args:
            tree: The prompt tree.
            temperature: By kind, what the logits are divided by; 1 for kinds not named.
        """
        kinds = list(tree.branches.values())
        rows = torch.cat([b.row[:, None].expand_as(b.mask)[b.mask] for b in kinds])
        logits = self._forward(tree, rows, torch.cat([b.parents[b.mask] for b in kinds])).logits
        parts = torch.split(logits, [int(b.mask.sum()) for b in kinds])
        result = {}
        for (kind, branches), part in zip(tree.branches.items(), parts, strict=True):
            scale = (temperature or {}).get(kind, 1.0)
            values = token_logprobs(part if scale == 1 else part / scale, branches.ids[branches.mask])
            result[kind] = values.new_zeros(branches.mask.shape).masked_scatter(branches.mask, values)
        return result

    def judge(self, tree: PromptTree) -> dict[str, Tensor]:
        """The discriminator's score of every branch by kind, (M,), read at the branch's last token."""
        nowhere = tree.ids.new_zeros(0)
        hidden = self._forward(tree, nowhere, nowhere).hidden
        return {
            kind: self.judge_head(hidden[branches.row, branches.last].float()).squeeze(-1)
            for kind, branches in tree.branches.items()
        }

    def _forward(self, tree: PromptTree, rows: Tensor, columns: Tensor) -> _Pass:
        """One pass over the tree; the head sees only the n places ``(rows, columns)``.

        A hook on the head does this, so whatever an architecture does to its logits afterwards still happens.
        """
        seen: list[Tensor] = []

        def pick(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen.append(inputs[0])
            return (inputs[0][rows, columns],)

        handle = self.causal_lm.get_output_embeddings().register_forward_pre_hook(pick)
        try:
            logits = self.causal_lm(
                input_ids=tree.ids,
                attention_mask=tree.attention_mask,
                position_ids=tree.position_ids,
                use_cache=False,
            ).logits
        finally:
            handle.remove()
        return _Pass(seen[0], logits)

    # weights

    def parameters_of(self, player: str) -> list[nn.Parameter]:
        """What the player's optimizer may move: its LoRA matrices and, for the discriminator, the head."""
        lora = [p for name, p in self.lm.named_parameters() if f".{player}." in name]
        return lora + (list(self.judge_head.parameters()) if player == DISCRIMINATOR else [])


def load_base(base: str, dtype: str = "float32") -> PreTrainedModel:
    """Load and freeze a causal language model: "builtin", a hub id or a local folder."""
    name = str(resources.files("lora_gan") / BUILTIN) if base == BUILTIN else base
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise LoraGANError(f"dtype {dtype!r} is no number format of torch; give float32, bfloat16 or float16")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        raise LoraGANError(
            f"base {base!r} is neither a folder with a causal language model here nor could it be loaded from the hub; "
            f"give base: builtin, the folder of a saved model, or check the id and the network ({error})"
        ) from error
    return model.requires_grad_(False).eval()


def _peft_config(model: PreTrainedModel, settings: LoraSettings) -> LoraConfig:
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=settings.targets,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),
        task_type="CAUSAL_LM",
    )
