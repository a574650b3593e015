"""Backbone: one frozen causal language model, two LoRA adapters on it, and the discriminator's head.

Which adapter is active is a *mode*, and only :class:`Backbone` switches it. Forward, backward and step stay inside the
mode::

    with backbone.generator():
        loss = -backbone.logprobs(tree)["target"].mean()
        loss.backward()
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D
from transformers.utils import find_adapter_config_file

from lora_gan.attention import Masks, Pass, TreeForward, output_head
from lora_gan.bases import OBJECTS, locate
from lora_gan.context import model_context
from lora_gan.data.tokenizer import load_tokenizer
from lora_gan.dropout import AdapterDropout
from lora_gan.errors import LoraGANError
from lora_gan.flex import attention_by, attention_of, is_long
from lora_gan.head import Logits, Statistic, entropy, log_probability, statistics
from lora_gan.lightning_compat import patched_forward, switch_adapter
from lora_gan.number_formats import AUTO, default_device, quantized, resolved_dtype, torch_dtype
from lora_gan.tensors import fingerprint, in_float32, join
from lora_gan.tree import Branches, PromptTree, grow_parts

GENERATOR, DISCRIMINATOR, SNAPSHOT = "generator", "discriminator", "snapshot"
_ADAPTER = re.compile(r"(\.lora_\w+\.)(\w+)")  # in a parameter's name


@dataclass(frozen=True)
class LoraSettings:
    """Shape of one LoRA adapter (arXiv 2106.09685).

    Args:
        rank: Rank r of the update ΔW = (alpha / r)·B·A.
        alpha: Scale of the update; 2·rank is common.
        targets: Modules that get an adapter: "all-linear" selects every linear layer except the head, in any
            architecture; or a list of name endings, such as [c_attn, c_proj]; or a regular expression of whole names.
        use_rslora: Scale the update by alpha / √r instead, for high ranks (rsLoRA, arXiv 2312.03732).
        use_dora: Learn the magnitudes of the weights apart from their directions (DoRA, arXiv 2402.09353). Slower, and
            not for evolution, whose members are the products B·A alone.
        dropout: Probability with which an input of the generator's adapter is set to 0, in passes with a gradient
            alone. Samples are drawn without it, so the ratios of a policy gradient begin at other values than 1: use
            it for supervised learning. A discriminator has none, since its scores are rewards.
    """

    rank: int = 16
    alpha: int = 32
    targets: str | list[str] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise LoraGANError(f"LoRA rank must be at least 1, got {self.rank}")
        if self.alpha < 1:
            raise LoraGANError(
                f"lora.alpha must be at least 1, got {self.alpha}: at 0 the adapter would change nothing"
            )
        if not self.targets:
            raise LoraGANError("lora.targets is empty; set it to all-linear or to a list of layer names")
        if not 0 <= self.dropout < 1:
            raise LoraGANError(f"lora.dropout must be from 0 to below 1, got {self.dropout}")


def check_no_dropout(discriminator: LoraSettings) -> None:
    """Refuse dropout in a discriminator's adapter."""
    if discriminator.dropout:
        raise LoraGANError(
            f"the discriminator's lora.dropout must be 0, got {discriminator.dropout}: its scores are rewards, which "
            "would be random; lower its rank, or give it more negatives"
        )


@dataclass(frozen=True)
class BackboneSettings:
    """How the frozen base is loaded.

    Args:
        dtype: Data type of its weights: float32, bfloat16 or float16, or auto: bfloat16 on a CUDA GPU that computes in
            it (compute capability 8.0 and later) in precision bf16-mixed, else float32. Adapters and heads stay in
            float32.
        quantization: "4bit" or "8bit" quantises its linear layers (bitsandbytes, on a CUDA GPU).
        gradient_checkpointing: Trade time for memory: keep only the inputs of the layers and recompute the layers in
            the backward pass. The gradients are the same.
    """

    dtype: str = AUTO
    quantization: str | None = None
    gradient_checkpointing: bool = False

    def on(self, device: torch.device, precision: Any = None) -> BackboneSettings:
        """The settings with the data type that "auto" stands for on this device, in this precision of the trainer."""
        return replace(self, dtype=resolved_dtype(self.dtype, device, precision))


@dataclass(frozen=True)
class Predicted:
    """The model's predictions in its active mode for the tokens of all branches of one kind."""

    logprobs: Tensor  # (M, T) log-probability of each token, 0 where masked
    entropy: Tensor | None  # (M, T) in nats, of the distribution from which each token was drawn; None if not asked for
    logits: Logits  # of the n tokens that are not masked, row by row, at temperature 1
    temperature: float  # of log-probabilities and entropies
    hidden: Tensor  # (B, L, H) last hidden states of the trees, as the head receives them
    branches: Branches

    @property
    def states(self) -> Tensor:
        """(M, T, H) the hidden state from which each token was predicted."""
        return self.hidden[self.branches.row[:, None], self.branches.parents]


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
        check_no_dropout(discriminator)
        settings = settings.on(default_device())
        model = load_base(base, settings.dtype, settings.quantization)
        if base in OBJECTS:  # which is as it was given
            settings = replace(settings, dtype=str(model.dtype).removeprefix("torch."))
        self.tokenizer = load_tokenizer(base)
        self.vocabulary = usable_vocabulary(model, self.tokenizer)
        self.context_length = model_context(model.config)
        # many a tokenizer knows no limit; negatives and exports follow it
        self.tokenizer.model_max_length = min(self.tokenizer.model_max_length, self.context_length)
        self.hidden_size = width_of_states(model)
        self.settings = settings
        self.generator_lora = generator
        self.lm = with_adapter(model, generator, GENERATOR)
        second = peft_config(model, discriminator)
        with _adaptable(model, discriminator):
            self.lm.add_adapter(DISCRIMINATOR, second)
        self.score_head = nn.Linear(self.hidden_size, 2, dtype=torch.float32)  # score and auxiliary prediction
        self._layers = [m for m in self.lm.modules() if isinstance(m, BaseTunerLayer)]
        self._let_both_learn()
        self._recomputed = layers_to_recompute(self.lm) if settings.gradient_checkpointing else []
        self._dropout = AdapterDropout(self.lm)
        self._activate(None)
        self.train(False)
        self._tree_forward = TreeForward(self.causal_lm)

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
        base = {n.replace(".base_layer", ""): p for n, p in self.lm.named_parameters() if adapter_of(n) is None}
        return {"format": self.settings.quantization or self.settings.dtype, "weights": fingerprint(base)}

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: the base's dropout would make log-probabilities irreproducible."""
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
        switch_adapter(self._layers, adapter)
        self._active = adapter

    def _let_both_learn(self) -> None:
        """PEFT disables the gradients of all adapters but the first or the last one; here both roles keep them."""
        for name, parameter in self.lm.named_parameters():
            if adapter_of(name) is not None:
                parameter.requires_grad_(adapter_of(name) != SNAPSHOT)

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
            self._let_both_learn()
            self._activate(active)
        return SNAPSHOT

    def drop_snapshot(self) -> None:
        """Be as before the first :meth:`take_snapshot`, for loading a state from before it."""
        if self.has_snapshot:
            active = self._active
            self.lm.delete_adapter(SNAPSHOT)
            self._let_both_learn()
            self._activate(active)

    @torch.no_grad()
    def copy_adapter(self, source: str, destination: str) -> None:
        """Give one adapter the weights of another.

        Raises:
            LoraGANError: Their shapes differ.
        """
        for given, weights in self._pairs(source, destination):
            if given is None or given.shape != weights.shape:
                raise LoraGANError(
                    f"the adapters {source} and {destination} differ in shape; give both the same rank and targets"
                )
            weights.copy_(given)

    def same(self, one: str, other: str) -> bool:
        """Whether two adapters have the same weights."""
        return all(given is not None and torch.equal(given, weights) for given, weights in self._pairs(one, other))

    def _pairs(self, source: str, destination: str) -> list[tuple[nn.Parameter | None, nn.Parameter]]:
        """The weights of the second adapter, each behind that of the first in its place."""
        weights = dict(self.lm.named_parameters())
        theirs = [name for name in weights if adapter_of(name) == destination]
        return [(weights.get(_ADAPTER.sub(rf"\g<1>{source}", name)), weights[name]) for name in theirs]

    # passes

    def logprobs(self, tree: PromptTree, temperature: Mapping[str, float] | None = None) -> dict[str, Tensor]:
        """Log-probability of every branch token in the active mode, by kind: (M, T), 0 where masked.

        Args:
            tree: The prompt tree.
            temperature: By kind, the divisor of the logits; 1 for missing kinds.
        """
        return self.logprobs_at([tree], temperature or {})[0]

    def logprobs_of(
        self,
        prompts: Sequence[Tensor],
        completions: Mapping[str, Sequence[Sequence[Tensor]]],
        parts: Sequence[Sequence[int]],
        temperature: Mapping[str, float] | None = None,
    ) -> dict[str, Tensor]:
        """:meth:`logprobs` of completions of all kinds to B prompts (P,), with one pass for each part of the prompts.

        Args:
            prompts: B tensors (P,).
            completions: By kind, those of each prompt, tensors (T,), none empty.
            parts: The prompts of each pass.
            temperature: By kind, the divisor of the logits; 1 for missing kinds.
        """
        return self.logprobs_at(grow_parts(prompts, completions, parts), temperature or {})[0]

    def logprobs_at(self, trees: Sequence[PromptTree], *temperatures: Mapping[str, float]) -> list[dict[str, Tensor]]:
        """:meth:`logprobs` at each temperature, of the branches of all trees, with one pass for each tree."""
        found = [self._logprobs_at(tree, temperatures) for tree in trees]
        return [{kind: join([part[kind] for part in parts]) for kind in parts[0]} for parts in zip(*found, strict=True)]

    def _logprobs_at(self, tree: PromptTree, temperatures: Sequence[Mapping[str, float]]) -> list[dict[str, Tensor]]:
        if not any(len(branches.row) for branches in tree.branches.values()):
            return [{kind: b.mask.float() for kind, b in tree.branches.items()} for _ in temperatures]
        _, logits = self._logits(tree)
        found: list[dict[str, Tensor]] = [{} for _ in temperatures]
        for kind, branches in tree.branches.items():
            at = [temperature.get(kind, 1.0) for temperature in temperatures]
            distinct = list(dict.fromkeys(at))
            values = _by_token(branches, logits[kind], [Statistic(log_probability, each) for each in distinct])
            for place, each in enumerate(at):
                found[place][kind] = values[distinct.index(each)]
        return found

    def predict(
        self, tree: PromptTree, temperature: Mapping[str, float] | None = None, with_entropy: bool = False
    ) -> dict[str, Predicted]:
        """:meth:`logprobs` together with entropies, if wanted, logits and hidden states, from the same pass."""
        hidden, logits = self._logits(tree)
        result = {}
        for kind, branches in tree.branches.items():
            scale = (temperature or {}).get(kind, 1.0)
            wanted = [Statistic(of, scale) for of in (log_probability, entropy)[: 1 + with_entropy]]
            logprobs, *entropies = _by_token(branches, logits[kind], wanted)
            result[kind] = Predicted(logprobs, next(iter(entropies), None), logits[kind], scale, hidden, branches)
        return result

    def _logits(self, tree: PromptTree) -> tuple[Tensor, dict[str, Logits]]:
        """Hidden states (B, L, H) of the trees, and by kind the logits of the tokens that are not masked."""
        kinds = list(tree.branches.values())
        rows = torch.cat([b.row[:, None].expand_as(b.mask)[b.mask] for b in kinds])
        columns = torch.cat([b.parents[b.mask] for b in kinds])
        self.masks()
        head = self._tree_forward.plain_head
        if head is None:
            done = self._forward(tree, rows, columns)
            hidden, source = done.hidden, done.logits
        else:
            hidden = self.hidden(tree)
            source = hidden[rows, columns]
        parts = torch.split(source, [int(b.mask.sum()) for b in kinds])
        logits = (Logits(part, self.vocabulary, head) for part in parts)
        return hidden, dict(zip(tree.branches, logits, strict=True))

    def score_branches(self, tree: PromptTree, embedded: Tensor | None = None) -> dict[str, Tensor]:
        """The discriminator's score and auxiliary prediction of every branch by kind, (M, 2), read at its last token.

        Args:
            tree: The prompt tree.
            embedded: (B, L, H) word embeddings to read instead of those of ``tree.ids``.
        """
        hidden = self.hidden(tree, embedded)
        return {
            kind: in_float32(self.score_head, hidden[branches.row, branches.last])
            for kind, branches in tree.branches.items()
        }

    def hidden(self, tree: PromptTree, embedded: Tensor | None = None) -> Tensor:
        """(B, L, H) last hidden states of the trees in the active mode."""
        nowhere = tree.ids.new_zeros(0)
        return self._forward(tree, nowhere, nowhere, embedded).hidden

    @torch.no_grad()
    def word_embeddings(self) -> Tensor:
        """(V, H) of all words in the active mode."""
        layer = self.causal_lm.get_input_embeddings()
        if type(layer) is nn.Embedding:
            return layer.weight[: self.vocabulary]
        words: Tensor = layer(torch.arange(self.vocabulary, device=self.device))  # it may scale, or have an adapter
        return words

    def masks(self) -> Masks | None:
        """The form in which the base takes its attention mask; None if trees are evaluated in separate rows.

        It is measured at the first call, on the base alone.
        """
        if not self._tree_forward.is_measured:
            with self.reference():
                self._tree_forward.masks()
        return self._tree_forward.masks()

    def _forward(self, tree: PromptTree, rows: Tensor, columns: Tensor, embedded: Tensor | None = None) -> Pass:
        """Run the model on the tree once; the head is applied only at the n positions ``(rows, columns)``."""
        self.masks()
        blocks = is_long(tree) and self._takes_blocks()
        with self._recomputing(), self._dropout.active(torch.is_grad_enabled()):
            return self._tree_forward(tree, rows, columns, embedded, blocks)

    def _takes_blocks(self) -> bool:
        with self.reference():
            return self._tree_forward.takes_blocks()

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """The layers are recomputed with the adapter of the forward pass, whichever is active by then.

        See https://github.com/huggingface/peft/issues/2832.
        """
        with recomputing(self._recomputed, preserve_rng_state=bool(self._dropout), context_fn=self._as_now):
            yield

    def _as_now(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self._again_in(self._active, attention_of(self.causal_lm))

    @contextmanager
    def _again_in(self, adapter: str | None, attention: str | None) -> Iterator[None]:
        with self._mode(adapter), self._dropout.active(True), attention_by(self.causal_lm, attention):
            yield

    # weights

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        """The parameters that the role's optimizer updates: its LoRA matrices and, for the discriminator, the head."""
        lora = [p for name, p in self.lm.named_parameters() if adapter_of(name) == role]
        return lora + (list(self.score_head.parameters()) if role == DISCRIMINATOR else [])


def _by_token(branches: Branches, logits: Logits, wanted: Sequence[Statistic]) -> list[Tensor]:
    """Numbers of the tokens of all branches, each (M, T), 0 where masked."""
    mask = branches.mask
    found = statistics(logits, branches.ids[mask], wanted)
    return [values.new_zeros(mask.shape).masked_scatter(mask, values) for values in found]


def adapter_of(name: str) -> str | None:
    """The adapter that a parameter belongs to, by its name; None for parameters of the base.

    PEFT writes ``…lora_A.generator.weight`` for linear layers and ``…lora_embedding_A.generator`` for word embeddings.
    """
    found = _ADAPTER.search(name)
    return found[2] if found else None


def has_learned(backbone: Backbone, role: str) -> bool:
    """Whether a role's adapter changes the base: one of its two matrices is 0 until the first update."""
    adapter = {n: p for n, p in backbone.lm.named_parameters() if adapter_of(n) == role}
    return any(bool(p.any()) for name, p in adapter.items() if "lora_B" in name or "lora_embedding_A" in name)


def load_base(base: str, dtype: str = "float32", quantization: str | None = None) -> PreTrainedModel:
    """Load and freeze a causal language model: "builtin", a hub id, a local folder, a GGUF file or a named object.

    Attention is SDPA where the architecture supports it, else its own.

    Raises:
        LoraGANError: The model cannot be loaded, is a PEFT adapter, lacks weights in its files, or the data type is
            unknown.
    """
    if base in OBJECTS:
        return OBJECTS[base][0].requires_grad_(False).eval()
    how = {"dtype": torch_dtype(dtype), **quantized(quantization, dtype)}
    name = locate(base)
    _refuse_adapter(base, name)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **how)
    except (OSError, ValueError, RuntimeError, KeyError, EOFError, SafetensorError, UnpicklingError) as error:
        raise LoraGANError(f"cannot load base {base!r}: {error}\n{_remedy(name)}") from error
    if report["missing_keys"]:
        raise LoraGANError(
            f"the files of base {base!r} lack {len(report['missing_keys'])} of the model's weights, such as "
            f"{min(report['missing_keys'])}, which would be random; save or download the model again"
        )
    return model.requires_grad_(False).eval()


def _refuse_adapter(base: str, name: str) -> None:
    """transformers would load the adapter's base and leave the adapter switched off here."""
    try:
        config = find_adapter_config_file(name)
        adapted = config and json.loads(Path(config).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError):  # no such base, which loading it reports
        return
    if config:
        raise LoraGANError(
            f"{base!r} is a PEFT adapter of the base {adapted!r}, not a whole model: give --model.base {adapted} and "
            f"--model.generator.adapter {base}; where the two are wanted as one base, merge them first (export "
            "--merge true, or merge_and_unload of PEFT), in a folder without adapter_config.json"
        )


def _remedy(name: str) -> str:
    if Path(name).exists():
        return "it must be the folder of a causal language model saved by transformers, with all of its files"
    return "set base to builtin or to the folder of a saved model, or check the hub id and the network"


def layers_to_recompute(lm: PeftModel) -> list[GradientCheckpointingLayer]:
    """The layers of a model for :func:`recomputing`.

    Raises:
        LoraGANError: It has none.
    """
    layers = [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise LoraGANError(
            f"{type(lm.get_base_model()).__name__} does not support gradient checkpointing; set "
            "gradient_checkpointing: false"
        )
    return layers


@contextmanager
def recomputing(layers: Sequence[nn.Module], **how: Any) -> Iterator[None]:
    """With gradients enabled, let the layers keep only their inputs and recompute the rest in the backward pass.

    The gradient checkpointing of transformers works in training mode only, which would enable the base's dropout.

    Args:
        layers: The layers.
        **how: Arguments of ``torch.utils.checkpoint.checkpoint``.
    """

    def again(layer: nn.Module) -> Callable[..., Any]:
        return partial(checkpoint, layer.forward, use_reentrant=False, **how)

    with patched_forward(layers if torch.is_grad_enabled() else [], again):
        yield


def usable_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of the model's tokens the tokenizer knows; embeddings are often padded with rows that mean nothing.

    Raises:
        LoraGANError: The tokenizer has tokens that the model has no embedding for.
    """
    known: int = max(tokenizer.get_vocab().values()) + 1
    rows = len(model.get_input_embeddings().weight)
    if known > rows:
        raise LoraGANError(
            f"the tokenizer of {model.name_or_path!r} has {known} tokens, but the model has embeddings for {rows}; "
            "save the tokenizer that belongs to the model beside it"
        )
    return known


def width_of_states(model: PreTrainedModel) -> int:
    """H, the size of the last hidden states, as the head receives them."""
    return int(output_head(model).get_parameter("weight").shape[-1])


def with_adapter(model: PreTrainedModel, settings: LoraSettings, name: str) -> PeftModel:
    """The model with a first adapter.

    Raises:
        LoraGANError: The model's layers cannot have such an adapter.
    """
    config = peft_config(model, settings)
    with _adaptable(model, settings):
        return get_peft_model(model, config, adapter_name=name)


@contextmanager
def _adaptable(model: PreTrainedModel, settings: LoraSettings) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise LoraGANError(
            f"lora.targets {settings.targets} cannot have an adapter in {type(model).__name__} ({reason}); "
            f"set it to layers among {', '.join(_names(model))}"
        ) from error


def peft_config(model: PreTrainedModel, settings: LoraSettings) -> LoraConfig:
    """PEFT's configuration of an adapter.

    Raises:
        LoraGANError: A target is not the name of a layer; PEFT would ignore it beside one that is.
    """
    names = {name for name, _ in model.named_modules()}
    for target in settings.targets if isinstance(settings.targets, list) else []:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise LoraGANError(
                f"{type(model).__name__} has no layer {target!r}; set lora.targets to all-linear or to layers among "
                f"{', '.join(_names(model))}"
            )
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=settings.targets,
        exclude_modules=_not_adapted(model),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        lora_dropout=settings.dropout,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),
        base_model_name_or_path=model.name_or_path,
        task_type="CAUSAL_LM",
    )


def _not_adapted(model: PreTrainedModel) -> str | None:
    """A regular expression of the modules that get no adapter; None if it would be empty.

    These are other parts than the text model, such as a vision tower, and linear layers that do more than a product:
    routers that return several tensors, grouped products.
    """
    names = {id(module): name for name, module in model.named_modules()}
    others = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and not _is_product(m)]
    patterns = sorted({re.sub(r"\d+", r"\\d+", re.escape(name)) for name in others})
    if model.config.get_text_config(decoder=True) is not model.config and hasattr(model, "get_decoder"):
        kept = [names.get(id(module)) for module in (model.get_decoder(), model.get_output_embeddings())]
        patterns.append(f"(?!({'|'.join(re.escape(name) for name in kept if name)})(\\.|$)).*")
    return "|".join(patterns) or None


def _is_product(layer: nn.Linear) -> bool:
    """Whether the layer maps a vector to a vector. Classes that no architecture defines are for quantisation and do."""
    if not type(layer).__module__.startswith("transformers.models."):
        return True
    try:
        with torch.no_grad():
            return isinstance(layer(layer.weight.new_zeros(1, layer.in_features)), Tensor)
    except RuntimeError:  # it reads another shape
        return False


def _names(model: PreTrainedModel) -> list[str]:
    """Name endings of the layers that can have an adapter."""
    layers = (name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D | nn.Embedding))
    return sorted({name.removesuffix(".base_layer").rpartition(".")[2] for name in layers if ".lora_" not in name})
