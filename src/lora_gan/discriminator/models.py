"""Discriminator architectures."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lora_gan.attention import TreeForward
from lora_gan.backbone import (
    DISCRIMINATOR,
    GENERATOR,
    SNAPSHOT,
    Backbone,
    LoraSettings,
    check_no_dropout,
    has_learned,
    layers_to_recompute,
    load_base,
    recomputing,
    usable_vocabulary,
    width_of_states,
    with_adapter,
)
from lora_gan.context import model_context
from lora_gan.data.tokenizer import encode_completions, load_tokenizer
from lora_gan.discriminator.inputs import (
    DiscriminatorInput,
    InputFormat,
    PromptAndCompletion,
    TargetAndCompletion,
    completion_leads,
)
from lora_gan.errors import LoraGANError
from lora_gan.number_formats import AUTO
from lora_gan.tensors import in_float32
from lora_gan.tree import PromptTree, grow
from lora_gan.types import DiscriminatorBatch

log = logging.getLogger("lora_gan")


class DiscriminatorModel(nn.Module, ABC):
    """Architecture of a discriminator: scores completions, each by itself, and twice the same where it reads it twice.

    Args:
        input_format: What it reads; by default the completion after its prompt.
    """

    has_auxiliary = True  # False: its auxiliary prediction is always 0, or the logit of a tie
    compares = False  # True: a score is a completion's margin over its target, and auxiliary the logit of a tie
    differentiable = False  # True: defines `tree` and `score_embedded`, so that a gradient can reach the generator

    def __init__(self, input_format: InputFormat | None = None) -> None:
        super().__init__()
        self.input_format = input_format or PromptAndCompletion()
        self.differentiable = type(self).differentiable and self.input_format.keeps_tokens

    def build(self, backbone: Backbone) -> None:
        """Create the parts that depend on the base; called once by the module."""

    @abstractmethod
    def forward(self, backbone: Backbone, batch: DiscriminatorBatch) -> dict[str, Tensor]:
        """Score and auxiliary prediction of each completion by kind: (M, 2)."""

    def trainable(self, backbone: Backbone) -> list[nn.Parameter]:
        """Parameters that the discriminator's optimizer updates."""
        return [p for p in self.parameters() if p.requires_grad]

    @contextmanager
    def mode(self, backbone: Backbone) -> Iterator[None]:
        """Activate the backbone's mode that the model needs; forward, backward and step stay inside."""
        yield

    def has_learned(self, backbone: Backbone) -> bool:
        """Whether it has learned, as far as that can be seen."""
        return True

    def tree(self, backbone: Backbone, batch: DiscriminatorBatch) -> PromptTree:
        """The input as a prompt tree of the base's tokens; defined by ``differentiable`` models."""
        raise NotImplementedError(f"{type(self).__name__} is differentiable and must define tree")

    def score_embedded(self, backbone: Backbone, tree: PromptTree, embedded: Tensor) -> dict[str, Tensor]:
        """:meth:`forward` on word embeddings (B, L, H) in place of the tree's tokens; defined likewise."""
        raise NotImplementedError(f"{type(self).__name__} is differentiable and must define score_embedded")

    def start_from_generator(self, backbone: Backbone) -> None:
        """Replace the weights by those of the generator's adapter.

        Raises:
            LoraGANError: The architecture is not an adapter on the shared base.
        """
        raise LoraGANError(f"{type(self).__name__} cannot start from the generator's adapter; use AdapterDiscriminator")


class AdapterDiscriminator(DiscriminatorModel):
    """The second LoRA adapter on the shared base, with a linear head at the completion's last token.

    Args:
        input_format: What it reads; by default the completion after its prompt.
    """

    differentiable = True

    def build(self, backbone: Backbone) -> None:
        _warn_of_unused_head(backbone.lm)

    def forward(self, backbone: Backbone, batch: DiscriminatorBatch) -> dict[str, Tensor]:
        return backbone.score_branches(self.tree(backbone, batch))

    def tree(self, backbone: Backbone, batch: DiscriminatorBatch) -> PromptTree:
        return _tree(self.input_format(batch, backbone.tokenizer), backbone.context_length)

    def score_embedded(self, backbone: Backbone, tree: PromptTree, embedded: Tensor) -> dict[str, Tensor]:
        return backbone.score_branches(tree, embedded)

    def trainable(self, backbone: Backbone) -> list[nn.Parameter]:
        return backbone.parameters_of(DISCRIMINATOR)

    @contextmanager
    def mode(self, backbone: Backbone) -> Iterator[None]:
        with backbone.discriminator():
            yield

    def has_learned(self, backbone: Backbone) -> bool:
        return has_learned(backbone, DISCRIMINATOR)

    def start_from_generator(self, backbone: Backbone) -> None:
        backbone.copy_adapter(GENERATOR, DISCRIMINATOR)


class PairwiseDiscriminator(AdapterDiscriminator):
    """The second adapter as a critic that reads target and completion side by side: which is the target, or a tie?

    The critic of RARO (arXiv 2511.21667) with the two outputs of the linear head in place of a written verdict: a
    margin s of the first over the second, and the logit t of a tie; the probabilities are Davidson's (1970), see
    :func:`lora_gan.tensors.davidson`. The score is the margin in favour of the completion, so a target has the score
    0, as has a completion that equals it: below 0 the completion loses. A score says nothing where there is no target.
    Its objective is :class:`PairwisePayoff`, its reward :class:`lora_gan.rewards.Payoff`.

    Args:
        input_format: How the two stand behind the prompt.
    """

    differentiable = False
    has_auxiliary = False
    compares = True

    def __init__(self, input_format: TargetAndCompletion | None = None) -> None:
        super().__init__(input_format or TargetAndCompletion())

    def forward(self, backbone: Backbone, batch: DiscriminatorBatch) -> dict[str, Tensor]:
        leads = completion_leads(batch)
        return {
            kind: torch.stack([x[:, 0] * _sides(batch, kind, leads[kind]).to(x), x[:, 1]], -1)
            for kind, x in super().forward(backbone, batch).items()
        }


class LikelihoodDiscriminator(AdapterDiscriminator):
    """The second adapter with the language-model head: how much likelier than a reference it makes the completion.

    Score = intercept + β·Σ_t (log p(y_t) − log p_reference(y_t)), the reward that a likelihood implies (arXiv
    2412.01981, eq. 3; arXiv 2502.01456). It sees a wrong token where it stands, so it needs far fewer examples than a
    linear head at the last token. The reference is the generator's snapshot, or the base before there is one. Start
    both from the generator: a phase of ``lora_gan.callbacks.Curriculum`` with ``take_snapshot`` and
    ``discriminator_from_generator``; then all scores begin at the intercept.

    Args:
        beta: β, what a nat counts.
    """

    differentiable = False
    has_auxiliary = False

    def __init__(self, beta: float = 0.5) -> None:
        super().__init__()
        if not (beta > 0 and math.isfinite(beta)):
            raise LoraGANError(f"beta must be a finite number above 0, got {beta}")
        self.beta = beta
        self.intercept = nn.Parameter(torch.zeros(()))

    def build(self, backbone: Backbone) -> None:
        """Nothing depends on the base; an adapter on its head learns, too."""

    def forward(self, backbone: Backbone, batch: DiscriminatorBatch) -> dict[str, Tensor]:
        tree = self.tree(backbone, batch)
        with backbone.snapshot():
            reference = backbone.logprobs(tree)
        found = {kind: x.sum(-1) - reference[kind].sum(-1) for kind, x in backbone.logprobs(tree).items()}
        scores = {kind: self.intercept + self.beta * x for kind, x in found.items()}
        return {kind: torch.stack([score, torch.zeros_like(score)], -1) for kind, score in scores.items()}

    def has_learned(self, backbone: Backbone) -> bool:
        """Not while it equals its reference, from which it starts."""
        return super().has_learned(backbone) and not (backbone.has_snapshot and backbone.same(DISCRIMINATOR, SNAPSHOT))

    def trainable(self, backbone: Backbone) -> list[nn.Parameter]:
        head = {id(parameter) for parameter in backbone.score_head.parameters()}
        return [p for p in backbone.parameters_of(DISCRIMINATOR) if id(p) not in head] + [self.intercept]


class OwnBaseDiscriminator(DiscriminatorModel):
    """A separate, larger language model with its own LoRA adapter, linear head and tokenizer.

    Args:
        base: "builtin", a hub id or a local folder.
        lora: Shape of its adapter.
        input_format: What it reads; by default the completion after its prompt.
        dtype: Data type of its frozen weights: float32, bfloat16 or float16, or auto: bfloat16 where the machine has a
            CUDA GPU that computes in it, else float32.
        quantization: "4bit" or "8bit" quantises its linear layers (bitsandbytes, on a CUDA GPU).
        gradient_checkpointing: Keep only the inputs of its layers and recompute the layers in the backward pass.
    """

    def __init__(
        self,
        base: str,
        lora: LoraSettings = LoraSettings(),
        input_format: InputFormat | None = None,
        dtype: str = AUTO,
        quantization: str | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(input_format)
        check_no_dropout(lora)
        model = load_base(base, dtype, quantization)
        self.tokenizer = load_tokenizer(base)
        self.context_length = model_context(model.config)
        self.lm = with_adapter(model, lora, DISCRIMINATOR)
        self._recomputed = layers_to_recompute(self.lm) if gradient_checkpointing else []
        _warn_of_unused_head(self.lm)
        self.head = nn.Linear(width_of_states(model), 2, dtype=torch.float32)
        self._tree_forward = TreeForward(self.lm.get_base_model())
        usable_vocabulary(model, self.tokenizer)
        self.train(False)

    def forward(self, backbone: Backbone, batch: DiscriminatorBatch) -> dict[str, Tensor]:
        reading = self.input_format(self._translated(batch, backbone.tokenizer), self.tokenizer)
        tree = _tree(reading, self.context_length)
        nowhere = tree.ids.new_zeros(0)
        with recomputing(self._recomputed, preserve_rng_state=False):
            hidden = self._tree_forward(tree, nowhere, nowhere).hidden
        return {kind: in_float32(self.head, hidden[b.row, b.last]) for kind, b in tree.branches.items()}

    def train(self, mode: bool = True) -> OwnBaseDiscriminator:
        return super().train(False)

    def _translated(self, batch: DiscriminatorBatch, theirs: PreTrainedTokenizerBase) -> DiscriminatorBatch:
        """The same texts as ids of this model's tokenizer."""
        prompts = tuple(self._ids(p, theirs) for p in batch.prompts)
        targets = tuple(self._ids(t, theirs, ends=True) for t in batch.targets)
        completions = {
            kind: [[self._ids(completion, theirs, ends=True) for completion in row] for row in rows]
            for kind, rows in batch.completions.items()
        }
        return DiscriminatorBatch(prompts, targets, completions)

    def _ids(self, ids: Tensor, theirs: PreTrainedTokenizerBase, ends: bool = False) -> Tensor:
        text = theirs.decode(ids, skip_special_tokens=True)
        if ends:
            return ids.new_tensor(encode_completions(self.tokenizer, [text])[0])
        return ids.new_tensor(self.tokenizer.encode(text, add_special_tokens=False) or [self.tokenizer.eos_token_id])


class HiddenStatesDiscriminator(DiscriminatorModel):
    """A small transformer encoder and a classifier over the generator's last hidden states of the completion.

    The states depend on the prompt, too. They are read without gradient, so that the discriminator's loss does not
    reach the generator (RLGAF, arXiv 2305.06176).

    Args:
        width: Size of the encoder's vectors.
        layers: Encoder layers.
        heads: Attention heads; a divisor of ``width``.
        input_format: What the generator reads; by default the completion after its prompt.
    """

    def __init__(
        self, width: int = 128, layers: int = 2, heads: int = 4, input_format: InputFormat | None = None
    ) -> None:
        super().__init__(input_format)
        if min(width, layers, heads) < 1 or width % heads:
            raise LoraGANError(f"width {width} must be a multiple of heads {heads}, and all of them at least 1")
        self.width = width
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True, dtype=torch.float32
        )
        self.encoder = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 2, dtype=torch.float32)

    def build(self, backbone: Backbone) -> None:
        size, kind = backbone.hidden_size, torch.float32
        self.project = nn.Sequential(nn.LayerNorm(size, dtype=kind), nn.Linear(size, self.width, dtype=kind))

    def forward(self, backbone: Backbone, batch: DiscriminatorBatch) -> dict[str, Tensor]:
        tree = _tree(self.input_format(batch, backbone.tokenizer), backbone.context_length)
        with backbone.generator(), torch.no_grad():
            hidden = backbone.hidden(tree).float()
        kinds = {kind: b for kind, b in tree.branches.items() if len(b.row)}
        scores = {kind: self._classify(hidden[b.row[:, None], b.columns], b.mask) for kind, b in kinds.items()}
        return {kind: scores.get(kind, hidden.new_zeros(0, 2)) for kind in tree.branches}

    def _classify(self, states: Tensor, mask: Tensor) -> Tensor:
        """(M, T, H) → (M, 2), the mean over each completion's tokens."""
        encoded = self.encoder(self.project(states), src_key_padding_mask=~mask)
        mean = torch.where(mask[..., None], encoded.float(), 0).sum(1) / mask.sum(1, keepdim=True)
        return in_float32(self.head, mean)


def _sides(batch: DiscriminatorBatch, kind: str, leads: list[list[bool]]) -> Tensor:
    """(M,) 1 for a completion before its target, −1 for one behind it, and 0 for the target itself."""
    first = torch.tensor([lead for row in leads for lead in row], dtype=torch.bool)
    return torch.where(torch.tensor(batch.are_targets(kind), dtype=torch.bool), 0, first * 2 - 1)


def _warn_of_unused_head(lm: PeftModel) -> None:
    head = lm.get_base_model().get_output_embeddings()
    if isinstance(head, LoraLayer) and DISCRIMINATOR in head.lora_A:
        log.warning(
            "the discriminator's adapter on the language-model head never learns, because the discriminator reads the "
            "states before it; take the head out of the targets of its lora"
        )


def _tree(reading: DiscriminatorInput, context: int) -> PromptTree:
    """The input as a prompt tree, which must fit into the model's context."""
    longest = max(
        len(start) + max((len(branch) for rows in reading.branches.values() for branch in rows[b]), default=0)
        for b, start in enumerate(reading.beginnings)
    )
    if longest > context:
        raise LoraGANError(
            f"the discriminator's input has {longest} tokens, more than its model's context of {context}: lower "
            "data.max_prompt_tokens or sampling.max_new_tokens, or choose a shorter discriminator.model.input_format"
        )
    return grow(reading.beginnings, reading.branches)
