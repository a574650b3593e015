"""Who judges, and what it reads: architectures of the discriminator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lora_gan.backbone import DISCRIMINATOR, GENERATOR, Backbone, LoraSettings, load_base, peft_config
from lora_gan.data.tokenizer import encode_answers, load_tokenizer
from lora_gan.errors import LoraGANError
from lora_gan.tree import PromptTree, grow
from lora_gan.types import Candidates

Branches = Mapping[str, Sequence[Sequence[Tensor]]]


@dataclass(frozen=True)
class Reading:
    """What a discriminator reads for B prompts: a beginning, and by kind what stands behind it."""

    beginnings: Sequence[Tensor]  # B tensors, none empty
    branches: Branches  # kind → B sequences of tensors, each ending with EOS


class JudgeInput(ABC):
    """How prompts, targets and answers become the discriminator's input."""

    @abstractmethod
    def __call__(self, candidates: Candidates, tokenizer: PreTrainedTokenizerBase) -> Reading:
        """What is read of each candidate."""


class PromptAndAnswer(JudgeInput):
    """The answer behind its prompt."""

    def __call__(self, candidates: Candidates, tokenizer: PreTrainedTokenizerBase) -> Reading:
        return Reading(candidates.prompts, candidates.answers)


class AnswerOnly(JudgeInput):
    """The answer alone, behind EOS."""

    def __call__(self, candidates: Candidates, tokenizer: PreTrainedTokenizerBase) -> Reading:
        start = candidates.prompts[0].new_tensor([tokenizer.eos_token_id])
        return Reading([start] * len(candidates.prompts), candidates.answers)


class AnswerAndTarget(JudgeInput):
    """``GEN: <answer> || TAR: <target>``, the input of GPT2Twin.

    Args:
        before: What stands before the answer.
        between: What stands between answer and target.
    """

    def __init__(self, before: str = "GEN: ", between: str = " || TAR: ") -> None:
        if not before:
            raise LoraGANError("before must not be empty: an answer needs something to stand behind")
        self.before = before
        self.between = between

    def __call__(self, candidates: Candidates, tokenizer: PreTrainedTokenizerBase) -> Reading:
        begin, between = (
            candidates.prompts[0].new_tensor(tokenizer.encode(text, add_special_tokens=False))
            for text in (self.before, self.between)
        )
        branches = {
            kind: [
                [torch.cat([answer[:-1], between, target]) for answer in answers]
                for answers, target in zip(rows, candidates.targets, strict=True)
            ]
            for kind, rows in candidates.answers.items()
        }
        return Reading([begin] * len(candidates.prompts), branches)


class Judge(nn.Module, ABC):
    """A discriminator: scores answers.

    Args:
        reads: What it reads; by default the answer behind its prompt.
    """

    differentiable = False  # True: reads word embeddings, too, so that a loss can reach the generator through it

    def __init__(self, reads: JudgeInput | None = None) -> None:
        super().__init__()
        self.reads = reads or PromptAndAnswer()

    def build(self, backbone: Backbone) -> None:
        """Make what depends on the base; called once by the module."""

    @abstractmethod
    def forward(self, backbone: Backbone, candidates: Candidates) -> dict[str, Tensor]:
        """Score and auxiliary prediction of each answer by kind: (M, 2)."""

    def learned(self, backbone: Backbone) -> list[nn.Parameter]:
        """What the discriminator's optimizer may move."""
        return [p for p in self.parameters() if p.requires_grad]

    @contextmanager
    def mode(self, backbone: Backbone) -> Iterator[None]:
        """The backbone's mode in which the judge works; forward, backward and step stay inside."""
        yield

    def start_from_generator(self, backbone: Backbone) -> None:
        """Begin with what the generator has learned.

        Raises:
            LoraGANError: This judge shares no architecture with it.
        """
        raise LoraGANError(f"{type(self).__name__} cannot start from the generator's adapter; AdapterJudge can")


class AdapterJudge(Judge):
    """The second LoRA adapter on the shared base, with a linear head at the answer's last token.

    Args:
        reads: What it reads; by default the answer behind its prompt.
    """

    differentiable = True

    def forward(self, backbone: Backbone, candidates: Candidates) -> dict[str, Tensor]:
        return backbone.judge(self.tree(backbone, candidates))

    def tree(self, backbone: Backbone, candidates: Candidates) -> PromptTree:
        """What is read, as a prompt tree."""
        return _tree(self.reads(candidates, backbone.tokenizer), backbone.context_length)

    def learned(self, backbone: Backbone) -> list[nn.Parameter]:
        return backbone.parameters_of(DISCRIMINATOR)

    @contextmanager
    def mode(self, backbone: Backbone) -> Iterator[None]:
        with backbone.discriminator():
            yield

    def start_from_generator(self, backbone: Backbone) -> None:
        backbone.copy_adapter(GENERATOR, DISCRIMINATOR)


class OwnBaseJudge(Judge):
    """Another, larger language model with LoRA of its own and a linear head; it reads texts, by its own tokenizer.

    Args:
        base: "builtin", a hub id or a local folder.
        lora: Shape of its adapter.
        reads: What it reads; by default the answer behind its prompt.
        dtype: Number format of its frozen weights.
    """

    def __init__(
        self,
        base: str,
        lora: LoraSettings = LoraSettings(),
        reads: JudgeInput | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__(reads)
        model = load_base(base, dtype)
        self.tokenizer = load_tokenizer(base)
        self.context_length: int = getattr(model.config, "max_position_embeddings", 1 << 30)
        self.lm = get_peft_model(model, peft_config(model, lora), adapter_name=DISCRIMINATOR)
        self.head = nn.Linear(model.config.hidden_size, 2)
        self.train(False)

    def forward(self, backbone: Backbone, candidates: Candidates) -> dict[str, Tensor]:
        reading = self.reads(self._translated(candidates, backbone.tokenizer), self.tokenizer)
        tree = _tree(reading, self.context_length)
        hidden = (
            self.lm.get_base_model()
            .base_model(
                input_ids=tree.ids, attention_mask=tree.attention_mask, position_ids=tree.position_ids, use_cache=False
            )
            .last_hidden_state
        )
        return {kind: self.head(hidden[b.row, b.last].float()) for kind, b in tree.branches.items()}

    def train(self, mode: bool = True) -> OwnBaseJudge:
        return super().train(False)

    def _translated(self, candidates: Candidates, theirs: PreTrainedTokenizerBase) -> Candidates:
        """The same texts as ids of the own tokenizer."""
        prompts = tuple(self._ids(p, theirs) for p in candidates.prompts)
        targets = tuple(self._ids(t, theirs, ends=True) for t in candidates.targets)
        answers = {
            kind: [[self._ids(answer, theirs, ends=True) for answer in row] for row in rows]
            for kind, rows in candidates.answers.items()
        }
        return Candidates(prompts, targets, answers)

    def _ids(self, ids: Tensor, theirs: PreTrainedTokenizerBase, ends: bool = False) -> Tensor:
        text = theirs.decode(ids, skip_special_tokens=True)
        if ends:
            return ids.new_tensor(encode_answers(self.tokenizer, [text])[0])
        return ids.new_tensor(self.tokenizer.encode(text, add_special_tokens=False) or [self.tokenizer.eos_token_id])


class HiddenStatesJudge(Judge):
    """A small transformer encoder and a classifier over the generator's last hidden states of the answer.

    The states have seen the prompt; they are read without gradient, so that nothing of the discriminator's loss reaches
    the generator (RLGAF, arXiv 2305.06176).

    Args:
        width: Size of the encoder's vectors.
        layers: Encoder layers.
        heads: Attention heads; a divisor of ``width``.
        reads: What the generator reads; by default the answer behind its prompt.
    """

    def __init__(self, width: int = 128, layers: int = 2, heads: int = 4, reads: JudgeInput | None = None) -> None:
        super().__init__(reads)
        if min(width, layers, heads) < 1 or width % heads:
            raise LoraGANError(f"width {width} must be a multiple of heads {heads}, and all of them at least 1")
        self.width = width
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)

    def build(self, backbone: Backbone) -> None:
        self.project = nn.Sequential(nn.LayerNorm(backbone.hidden_size), nn.Linear(backbone.hidden_size, self.width))

    def forward(self, backbone: Backbone, candidates: Candidates) -> dict[str, Tensor]:
        tree = _tree(self.reads(candidates, backbone.tokenizer), backbone.context_length)
        with backbone.generator(), torch.no_grad():
            hidden = backbone.hidden(tree).float()
        kinds = {kind: b for kind, b in tree.branches.items() if len(b.row)}
        scores = {kind: self._classify(hidden[b.row[:, None], b.columns], b.mask) for kind, b in kinds.items()}
        return {kind: scores.get(kind, hidden.new_zeros(0, 2)) for kind in tree.branches}

    def _classify(self, states: Tensor, mask: Tensor) -> Tensor:
        """(M, T, H) → (M, 2), the mean over each answer's tokens."""
        encoded = self.encoder(self.project(states), src_key_padding_mask=~mask)
        outputs: Tensor = self.head(torch.where(mask[..., None], encoded, 0).sum(1) / mask.sum(1, keepdim=True))
        return outputs


def _tree(reading: Reading, context: int) -> PromptTree:
    """What is read, as a prompt tree that fits into the reader's context."""
    longest = max(
        len(start) + max((len(branch) for rows in reading.branches.values() for branch in rows[b]), default=0)
        for b, start in enumerate(reading.beginnings)
    )
    if longest > context:
        raise LoraGANError(
            f"the discriminator would read {longest} tokens, more than its model's context of {context}: lower "
            "data.max_prompt_tokens or sampling.max_new_tokens, or let it read less (judge.reads)"
        )
    return grow(reading.beginnings, reading.branches)
