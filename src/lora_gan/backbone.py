"""Backbone: one frozen causal language model, two LoRA adapters on it, and the discriminator's head.

Which adapter is active is a *mode*, and only :class:`Backbone` switches it. Forward, backward and step stay inside the
mode::

    with backbone.generator():
        loss = -backbone.logprobs(tree)["target"].mean()
        loss.backward()
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import resources
from importlib.util import find_spec
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from lora_gan.context import model_context
from lora_gan.data.tokenizer import load_tokenizer
from lora_gan.errors import LoraGANError
from lora_gan.lightning_compat import patched_forward
from lora_gan.tensors import entropy, fingerprint, token_logprobs
from lora_gan.tree import Branches, PromptTree

GENERATOR, DISCRIMINATOR, SNAPSHOT = "generator", "discriminator", "snapshot"
BUILTIN = "builtin"


@dataclass(frozen=True)
class LoraSettings:
    """Shape of one LoRA adapter (arXiv 2106.09685).

    Args:
        rank: Rank r of the update ΔW = (alpha / r)·B·A.
        alpha: Scale of the update; 2·rank is common.
        targets: Modules that get an adapter: "all-linear" selects every linear layer except the head, in any
            architecture; or a list of name endings, such as [c_attn, c_proj].
    """

    rank: int = 16
    alpha: int = 32
    targets: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise LoraGANError(f"LoRA rank must be at least 1, got {self.rank}")


@dataclass(frozen=True)
class BackboneSettings:
    """How the frozen base is loaded.

    Args:
        dtype: Data type of its weights: float32, bfloat16 or float16; adapters and heads stay in float32.
        quantization: "4bit" or "8bit" quantises its linear layers (bitsandbytes, on a CUDA GPU).
        gradient_checkpointing: Trade time for memory: keep only the inputs of the layers and recompute the layers in
            the backward pass. The gradients are the same.
    """

    dtype: str = "float32"
    quantization: str | None = None
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class Predicted:
    """The model's predictions in its active mode for the tokens of all branches of one kind."""

    logprobs: Tensor  # (M, T) log-probability of each token, 0 where masked
    logits: Tensor  # (n, V) their logits, for the n tokens that are not masked, row by row
    hidden: Tensor  # (B, L, H) last hidden states of the trees, as the head receives them
    branches: Branches

    @property
    def states(self) -> Tensor:
        """(M, T, H) the hidden state from which each token was predicted."""
        return self.hidden[self.branches.row[:, None], self.branches.parents]

    @property
    def entropy(self) -> Tensor:
        """(M, T) entropy in nats of the distribution from which each token was drawn, 0 where masked."""
        mask = self.branches.mask
        return self.logprobs.new_zeros(mask.shape).masked_scatter(mask, entropy(self.logits))


@dataclass(frozen=True)
class _Pass:
    hidden: Tensor  # (B, L, H) last hidden states, as the head receives them
    logits: Tensor  # (n, V) at the selected positions


class Backbone(nn.Module):
    """The frozen base with its adapters ``generator`` and ``discriminator``.

    Args:
        base: "builtin", a hub id or a local folder of a causal language model.
        generator: LoRA settings of the generator.
        discriminator: LoRA settings of the discriminator.
        settings: How the base is loaded.
    """

    def __init__(
        self,
        base: str,
        generator: LoraSettings,
        discriminator: LoraSettings,
        settings: BackboneSettings = BackboneSettings(),
    ) -> None:
        super().__init__()
        model = load_base(base, settings.dtype, settings.quantization)
        self.tokenizer = load_tokenizer(base)
        self.context_length = model_context(model.config)
        self.hidden_size: int = model.config.hidden_size
        self.settings = settings
        self.generator_lora = generator
        self.lm: PeftModel = get_peft_model(model, peft_config(model, generator), adapter_name=GENERATOR)
        self.lm.add_adapter(DISCRIMINATOR, peft_config(model, discriminator))
        self.score_head = nn.Linear(self.hidden_size, 2)  # score and auxiliary prediction
        self._layers = [m for m in self.lm.modules() if isinstance(m, BaseTunerLayer)]
        self._lora = self._lora_parameters()
        self._recomputed = [m for m in self.lm.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not settings.gradient_checkpointing:
            self._recomputed = []
        elif not self._recomputed:
            raise LoraGANError(
                f"{base!r} does not support gradient checkpointing; set backbone.gradient_checkpointing: false"
            )
        self._activate(None)
        self.train(False)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The base as a model of transformers, its linear layers wrapped by PEFT."""
        return self.lm.get_base_model()

    @property
    def device(self) -> torch.device:
        return self.score_head.weight.device

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Identity of the base, even if its folder moves: a digest of its weights, and their data type."""
        base = {name.replace(".base_layer", ""): p for name, p in self.lm.named_parameters() if "lora_" not in name}
        return {"format": self.settings.quantization or self.settings.dtype, "weights": fingerprint(base)}

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: dropout would make log-probabilities irreproducible and ratios differ from 1."""
        return super().train(False)

    # modes

    @contextmanager
    def generator(self) -> Iterator[None]:
        """Activate the generator's adapter: for sampling completions and their log-probabilities."""
        with self._mode(GENERATOR):
            yield

    @contextmanager
    def discriminator(self) -> Iterator[None]:
        """Activate the discriminator's adapter: for scores and the auxiliary prediction."""
        with self._mode(DISCRIMINATOR):
            yield

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Turn all adapters off: for the base's log-probabilities, the reference of the KL term; no gradient."""
        with self._mode(None), torch.no_grad():
            yield

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Activate the generator's snapshot, or the base before the first :meth:`take_snapshot`; no gradient."""
        with self._mode(SNAPSHOT if self.has_snapshot else None), torch.no_grad():
            yield

    @contextmanager
    def _mode(self, adapter: str | None) -> Iterator[None]:
        previous = self._active
        if adapter == previous:
            yield
            return
        self._activate(adapter)
        try:
            yield
        finally:
            self._activate(previous)

    def _activate(self, adapter: str | None) -> None:
        """Switch adapters. PEFT disables the gradients of inactive ones; here both roles keep them."""
        for layer in self._layers:
            if adapter is None:
                layer.enable_adapters(False)
            else:
                layer.enable_adapters(True)
                layer.set_adapter(adapter)
        for name, parameter in self._lora.items():
            parameter.requires_grad_(f".{SNAPSHOT}." not in name)
        self._active = adapter

    def _lora_parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.lm.named_parameters() if "lora_" in name}

    # snapshot

    @property
    def has_snapshot(self) -> bool:
        """Whether there is a snapshot of the generator."""
        return SNAPSHOT in self.lm.peft_config

    def take_snapshot(self) -> None:
        """Freeze a copy of the current generator, replacing an earlier one."""
        self.copy_adapter(GENERATOR, self.add_snapshot())

    def add_snapshot(self) -> str:
        """Add the snapshot's adapter if there is none yet, before loading one for example; returns its name."""
        if not self.has_snapshot:
            active = self._active
            self.lm.add_adapter(SNAPSHOT, peft_config(self.causal_lm, self.generator_lora))
            self.lm.to(self.device)
            self._lora = self._lora_parameters()
            self._activate(active)
        return SNAPSHOT

    @torch.no_grad()
    def copy_adapter(self, source: str, destination: str) -> None:
        """Give one adapter the weights of another.

        Raises:
            LoraGANError: Their shapes differ.
        """
        weights = dict(self.lm.named_parameters())
        for name in [n for n in weights if f".{destination}." in n]:
            given = weights.get(name.replace(f".{destination}.", f".{source}."))
            if given is None or given.shape != weights[name].shape:
                raise LoraGANError(
                    f"the adapters {source} and {destination} differ in shape; give both the same rank and targets"
                )
            weights[name].copy_(given)

    # passes

    def logprobs(self, tree: PromptTree, temperature: Mapping[str, float] | None = None) -> dict[str, Tensor]:
        """Log-probability of every branch token in the active mode, by kind: (M, T), 0 where masked.

        Args:
            tree: The prompt tree.
            temperature: By kind, the divisor of the logits; 1 for missing kinds.
        """
        return {kind: predicted.logprobs for kind, predicted in self.predict(tree, temperature).items()}

    def predict(self, tree: PromptTree, temperature: Mapping[str, float] | None = None) -> dict[str, Predicted]:
        """:meth:`logprobs` together with logits and hidden states, from the same pass."""
        kinds = list(tree.branches.values())
        rows = torch.cat([b.row[:, None].expand_as(b.mask)[b.mask] for b in kinds])
        done = self._forward(tree, rows, torch.cat([b.parents[b.mask] for b in kinds]))
        parts = torch.split(done.logits, [int(b.mask.sum()) for b in kinds])
        result = {}
        for (kind, branches), part in zip(tree.branches.items(), parts, strict=True):
            scale = (temperature or {}).get(kind, 1.0)
            logits = part if scale == 1 else part / scale
            values = token_logprobs(logits, branches.ids[branches.mask])
            logprobs = values.new_zeros(branches.mask.shape).masked_scatter(branches.mask, values)
            result[kind] = Predicted(logprobs, logits, done.hidden, branches)
        return result

    def score_branches(self, tree: PromptTree, embedded: Tensor | None = None) -> dict[str, Tensor]:
        """The discriminator's score and auxiliary prediction of every branch by kind, (M, 2), read at its last token.

        Args:
            tree: The prompt tree.
            embedded: (B, L, H) word embeddings to read instead of those of ``tree.ids``.
        """
        hidden = self.hidden(tree, embedded)
        return {
            kind: self.score_head(hidden[branches.row, branches.last].float())
            for kind, branches in tree.branches.items()
        }

    def hidden(self, tree: PromptTree, embedded: Tensor | None = None) -> Tensor:
        """(B, L, H) last hidden states of the trees in the active mode."""
        nowhere = tree.ids.new_zeros(0)
        return self._forward(tree, nowhere, nowhere, embedded).hidden

    def embed(self, weights: Tensor) -> Tensor:
        """Mixtures of word embeddings: (n, V) weights → (n, H)."""
        table: Tensor = self.causal_lm.get_input_embeddings().weight
        return weights.to(table.dtype) @ table

    def _forward(self, tree: PromptTree, rows: Tensor, columns: Tensor, embedded: Tensor | None = None) -> _Pass:
        """Run the model on the tree once; the head is applied only at the n positions ``(rows, columns)``.

        A hook on the head selects them, so that an architecture's own processing of the logits still applies.
        """
        seen: list[Tensor] = []

        def pick(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen.append(inputs[0])
            return (inputs[0][rows, columns],)

        handle = self.causal_lm.get_output_embeddings().register_forward_pre_hook(pick)
        try:
            with self._recomputing():
                logits = self.causal_lm(
                    **({"input_ids": tree.ids} if embedded is None else {"inputs_embeds": embedded}),
                    attention_mask=tree.attention_mask,
                    position_ids=tree.position_ids,
                    use_cache=False,
                ).logits
        finally:
            handle.remove()
        return _Pass(seen[0], logits)

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """With gradients enabled, let the layers keep only their inputs and recompute the rest in the backward pass.

        They are recomputed with the adapter of the forward pass, whichever is active by then
        (https://github.com/huggingface/peft/issues/2832). The gradient checkpointing of transformers works in training
        mode only, which would enable dropout.
        """

        def again(layer: nn.Module) -> Callable[..., Any]:
            return partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, context_fn=self._as_now
            )

        with patched_forward(self._recomputed if torch.is_grad_enabled() else [], again):
            yield

    def _as_now(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self._mode(self._active)

    # weights

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        """The parameters that the role's optimizer updates: its LoRA matrices and, for the discriminator, the head."""
        lora = [p for name, p in self.lm.named_parameters() if f".{role}." in name]
        return lora + (list(self.score_head.parameters()) if role == DISCRIMINATOR else [])


def load_base(base: str, dtype: str = "float32", quantization: str | None = None) -> PreTrainedModel:
    """Load and freeze a causal language model: "builtin", a hub id or a local folder.

    Raises:
        LoraGANError: The model cannot be loaded, or the data type is unknown.
    """
    how = {} if quantization is None else quantized(quantization, dtype)
    name = str(resources.files("lora_gan") / BUILTIN) if base == BUILTIN else base
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise LoraGANError(f"unknown dtype {dtype!r}; use float32, bfloat16 or float16")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), attn_implementation="sdpa", **how
        )
    except (OSError, ValueError) as error:
        raise LoraGANError(
            f"cannot load base {base!r} from a local folder or the hub ({error}); "
            "set base to builtin or the folder of a saved model, or check the hub id and the network"
        ) from error
    return model.requires_grad_(False).eval()


def quantized(quantization: str, dtype: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for quantisation; 4 bits are NF4 with double quantisation (arXiv 2305.14314).

    Raises:
        LoraGANError: ``quantization`` is neither "4bit" nor "8bit", or a CUDA GPU or bitsandbytes is missing.
    """
    if quantization not in ("4bit", "8bit"):
        raise LoraGANError(f"quantization must be 4bit, 8bit or null, got {quantization!r}")
    if not torch.cuda.is_available():
        raise LoraGANError(
            f"quantization: {quantization} needs a CUDA GPU, and none was found; leave it out, and set dtype: bfloat16 "
            "to halve the base's memory"
        )
    if find_spec("bitsandbytes") is None:
        raise LoraGANError(f"quantization: {quantization} needs bitsandbytes: pip install 'lora-gan[quantization]'")
    from transformers import BitsAndBytesConfig

    compute = torch.bfloat16 if dtype == "float32" else getattr(torch, dtype)
    settings = BitsAndBytesConfig(
        load_in_4bit=quantization == "4bit",
        load_in_8bit=quantization == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    device = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
    return {"quantization_config": settings, "device_map": {"": device}}


def peft_config(model: PreTrainedModel, settings: LoraSettings) -> LoraConfig:
    """PEFT's configuration of an adapter."""
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=settings.targets,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),
        base_model_name_or_path=model.name_or_path,
        task_type="CAUSAL_LM",
    )
