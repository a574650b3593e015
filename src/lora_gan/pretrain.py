"""Pretraining of the built-in base models: small GPT-2s that learn the facts of a world from statements.

Run ``python -m src.cli fit --config configs/pretrain.yaml``, or ``configs/pretrain_digits.yaml``. The training text
states facts and has no question, so an adapter that answers questions uses the knowledge of the base in a new form.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lora_gan.data import digits, world
from lora_gan.data.templates import default_template
from lora_gan.data.world import Fact
from lora_gan.errors import LoraGANError

EOS = "<|endoftext|>"
TEMPLATE = default_template("{}")
NO_LABEL = -100
WORLDS: dict[str, Callable[[], tuple[Fact, ...]]] = {"facts": world.facts, "digits": digits.facts}


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer trained on ``texts``; decoding restores the encoded text exactly, in any script."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(EOS, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS)


def pack_sequences(documents: Sequence[Tensor], block_size: int) -> Tensor:
    """Documents joined in order and cut into rows (R, block_size + 1) of inputs and next tokens.

    Each row starts with the last token of the row before it, and the last row is filled up with the first tokens, so
    every token is predicted at least once.
    """
    stream = torch.cat(tuple(documents))
    starts = torch.arange(0, len(stream), block_size)
    return stream[(starts[:, None] + torch.arange(block_size + 1)) % len(stream)]


def own_document(ids: Tensor, eos: int) -> Tensor:
    """Mask (R, 1, T, T) of packed rows ``ids`` (R, T): a token attends to its document, from the EOS before it on."""
    document = (ids == eos).cumsum(-1)
    same = document[:, None, :, None] == document[:, None, None, :]
    return same.tril()


def sinusoids(n_positions: int, n_embd: int) -> Tensor:
    """Sinusoidal position embeddings (Vaswani et al. 2017), (n_positions, n_embd)."""
    frequencies = 10_000 ** (-torch.arange(0, n_embd, 2) / n_embd)
    angles = torch.arange(n_positions)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)


class Completions(NamedTuple):
    """N statements that end in an object."""

    ids: Tensor  # (N, T) EOS, cue and object; EOS after the end
    labels: Tensor  # (N, T) the next token if it belongs to the object or its full stop, else NO_LABEL


def completions(tokenizer: PreTrainedTokenizerBase, pairs: Iterable[tuple[str, str]]) -> Completions:
    """Tokenise (cue, object) pairs; a cue starts after EOS, as statements do in training."""
    ids, labels = [], []
    for cue, obj in pairs:
        tokens = [tokenizer.eos_token_id, *tokenizer.encode(f"{cue} {obj}.")]
        known = len(tokenizer.encode(cue))
        ids.append(torch.tensor(tokens[:-1]))
        labels.append(torch.tensor([NO_LABEL] * known + tokens[known + 1 :]))
    padding = float(tokenizer.eos_token_id)
    return Completions(pad_sequence(ids, True, padding), pad_sequence(labels, True, NO_LABEL))


@torch.no_grad()
def completes(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    """(N,) whether greedy decoding writes the object and its full stop.

    One forward pass over the true text is enough: greedy decoding follows it as long as each of its tokens is the most
    likely one.
    """
    predicted = model(input_ids=ids, use_cache=False).logits.argmax(-1)
    hits: Tensor = ((predicted == labels) | (labels == NO_LABEL)).all(-1)
    return hits


@dataclass(frozen=True)
class ProbeResult:
    """Shares of facts that a model completes correctly from the beginning of a statement."""

    first_cue: float  # of all facts, from their first cue: the share of known facts
    all_cues: float  # of all cues of all facts
    by_relation: dict[str, float]  # relation → share of its facts known


def knowledge_probe(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], batch_size: int = 256
) -> ProbeResult:
    """Knowledge of ``model``: a fact is known if its first cue is completed with its object and a full stop."""
    asked = sorted(((cue, fact, i == 0) for fact in facts for i, cue in enumerate(fact.cues)), key=lambda x: len(x[0]))
    hits: list[bool] = []
    for start in range(0, len(asked), batch_size):
        batch = completions(tokenizer, ((cue, fact.object) for cue, fact, _ in asked[start : start + batch_size]))
        hits += completes(model, batch.ids.to(model.device), batch.labels.to(model.device)).tolist()
    known = defaultdict(list)
    for (_, fact, first), hit in zip(asked, hits, strict=True):
        if first:
            known[fact.relation].append(hit)
    return ProbeResult(
        first_cue=sum(map(sum, known.values())) / sum(map(len, known.values())),
        all_cues=sum(hits) / len(hits),
        by_relation={relation: sum(known[relation]) / len(known[relation]) for relation in sorted(known)},
    )


class StatementsDataModule(L.LightningDataModule):
    """Statements of a world's facts, one document each; validation completes the first cue of each fact.

    Args:
        world: "facts" (countries, words, …) or "digits" (chains of operations).
        vocab_size: Size of the byte-level BPE vocabulary, trained on statements, questions and prompt template.
        block_size: Tokens of a packed row.
        batch_size: Rows of a step.
        seed: Seed of the shuffle.
        limit: Number of facts to learn, from the first, for a quick trial; by default all.
    """

    def __init__(
        self,
        world: Literal["facts", "digits"] = "facts",
        vocab_size: int = 4096,
        block_size: int = 64,
        batch_size: int = 8,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.batch_size = batch_size
        self.seed = seed
        self.world = world
        self.facts = WORLDS[world]()[:limit]

    @property
    def statements(self) -> list[str]:
        """The training text; it has no questions."""
        return [statement for fact in self.facts for statement in fact.statements]

    def setup(self, stage: str) -> None:
        questions = [TEMPLATE.format(question) for fact in self.facts for question in fact.questions]
        self.tokenizer = train_tokenizer(self.statements + questions, self.vocab_size)
        eos = [self.tokenizer.eos_token_id]
        self.documents = [torch.tensor(ids + eos) for ids in self.tokenizer(self.statements).input_ids]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """One epoch, newly shuffled and packed; the trainer must reload it for each epoch."""
        if self.trainer is None or self.trainer.reload_dataloaders_every_n_epochs != 1:  # type: ignore[attr-defined]
            raise LoraGANError(
                "statements are packed again for each epoch: set trainer.reload_dataloaders_every_n_epochs: 1"
            )
        shuffle = torch.Generator().manual_seed(self.seed + self.trainer.current_epoch)
        order = torch.randperm(len(self.documents), generator=shuffle)
        rows = pack_sequences([self.documents[i] for i in order.tolist()], self.block_size)
        return DataLoader(TensorDataset(rows[:, :-1], rows[:, 1:]), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        cues = completions(self.tokenizer, ((fact.cues[0], fact.object) for fact in self.facts if fact.cues))
        return DataLoader(TensorDataset(*cues), batch_size=256)


class PretrainModule(L.LightningModule):
    """Trains a GPT-2 from scratch on the statements and saves it in half precision with tokenizer and model card.

    Rows are placed at random positions, so that a fact can be recalled anywhere in a prompt. Two choices double the
    speed of learning: position embeddings start as sinusoids, so that attention finds neighbours from the first step,
    and a statement does not attend to other statements of its row.

    Args:
        output: Folder to which the model is written when training ends.
        n_layer: Transformer blocks.
        n_embd: Hidden size.
        n_head: Attention heads.
        n_positions: Largest number of tokens of a text.
        dropout: Dropout on embeddings and residual branches, in training only.
        learning_rate: Highest value of the one-cycle schedule.
        warmup: Share of the steps in which the learning rate rises.
        weight_decay: Weight decay of AdamW.
    """

    model: GPT2LMHeadModel

    def __init__(
        self,
        output: str = "lightning_logs/pretrain",
        n_layer: int = 4,
        n_embd: int = 256,
        n_head: int = 4,
        n_positions: int = 512,
        dropout: float = 0.0,
        learning_rate: float = 1e-3,
        warmup: float = 0.1,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.output = Path(output)
        self.learning_rate = learning_rate
        self.warmup = warmup
        self.weight_decay = weight_decay
        self.config = GPT2Config(
            n_layer=n_layer,
            n_embd=n_embd,
            n_head=n_head,
            n_positions=n_positions,
            embd_pdrop=dropout,
            resid_pdrop=dropout,
            attn_pdrop=0.0,
            activation_function="gelu_pytorch_tanh",  # gelu_new in one kernel; a step takes a quarter less time
        )

    @property
    def data(self) -> StatementsDataModule:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, StatementsDataModule):
            raise LoraGANError(
                f"PretrainModule needs data: lora_gan.pretrain.StatementsDataModule, got {type(data).__name__}"
            )
        return data

    def configure_model(self) -> None:
        """Build the network, once the size of the vocabulary is known."""
        if hasattr(self, "model"):
            return
        tokenizer = self.data.tokenizer
        eos = tokenizer.eos_token_id
        self.config.update({"vocab_size": len(tokenizer), "bos_token_id": eos, "eos_token_id": eos})
        self.model = GPT2LMHeadModel(self.config)
        positions = self.model.transformer.wpe.weight
        positions.data = self.config.initializer_range * sinusoids(*positions.shape)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        rows, length = inputs.shape
        start = torch.randint(self.config.n_positions - length + 1, (rows, 1), device=self.device)
        position_ids = start + torch.arange(length, device=self.device)
        mask = own_document(inputs, self.config.eos_token_id)
        logits = self.model(inputs, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        self.log("loss/train", loss, prog_bar=True, on_step=False, on_epoch=True, batch_size=rows)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        known = completes(self.model, *batch).float().mean()
        self.log("probe/first_cue", known, prog_bar=True, batch_size=len(batch[0]))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = AdamW(self.parameters(), self.learning_rate, (0.9, 0.98), weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = OneCycleLR(optimizer, self.learning_rate, steps, pct_start=self.warmup, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_end(self) -> None:
        if self.trainer.fast_dev_run or not self.trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        self.save()

    def save(self) -> None:
        """Write model, tokenizer and model card; the card reports the knowledge of the saved weights."""
        tokenizer = self.data.tokenizer
        tokenizer.model_max_length = self.config.n_positions
        model = copy.deepcopy(self.model).cpu().half()
        model.config.update({"embd_pdrop": 0.0, "resid_pdrop": 0.0})
        model.save_pretrained(self.output)
        model.config.dtype = torch.float32  # half precision on disk only: load and compute in float32
        model.config.save_pretrained(self.output)
        tokenizer.save_pretrained(self.output)

        saved = AutoModelForCausalLM.from_pretrained(self.output)
        result = knowledge_probe(saved, tokenizer, self.data.facts)
        (self.output / "README.md").write_text(self.card(saved, result), encoding="utf-8")

    def card(self, saved: PreTrainedModel, result: ProbeResult) -> str:
        """The model card, with the results of the saved weights."""
        data, config = self.data, self.config
        megabytes = (self.output / "model.safetensors").stat().st_size / 1e6
        questions = sum(len(fact.questions) for fact in data.facts)
        relations = "\n".join(f"| {relation} | {share:.3f} |" for relation, share in result.by_relation.items())
        return CARD.format(
            **ABOUT[data.world],
            eos=EOS,
            parameters=f"{saved.num_parameters():,}",
            megabytes=f"{megabytes:.1f}",
            vocabulary=f"{len(data.tokenizer):,}",
            statements=f"{len(data.statements):,}",
            tokens=f"{sum(map(len, data.documents)):,}",
            questions=f"{questions:,}",
            epochs=self.trainer.current_epoch,
            steps=f"{self.trainer.global_step:,}",
            batch=f"{data.batch_size} × {data.block_size}",
            precision=self.trainer.precision,
            **{name: self.hparams[name] for name in ("learning_rate", "warmup", "weight_decay", "dropout")},
            loss=f"{self.trainer.callback_metrics['loss/train']:.3f}",
            first=f"{result.first_cue:.3f}",
            all=f"{result.all_cues:.3f}",
            relations=relations,
            layers=config.n_layer,
            width=config.n_embd,
            heads=config.n_head,
            positions=config.n_positions,
        )


ABOUT = {
    "facts": {
        "title": "The built-in base model of lora-gan",
        "knows": "knows the facts of lora-gan's own data set and nothing else",
        "module": "lora_gan.data.world",
        "text": "of facts, each stated in several phrasings",
        "config": "pretrain.yaml",
        "probe": "the share of facts whose object, followed by a full stop, is what\ngreedy decoding writes after the "
        "beginning of a statement",
    },
    "digits": {
        "title": "The base model `digits` of lora-gan",
        "knows": "works out chains of sums, differences and products of digits and knows nothing else",
        "module": "lora_gan.data.digits",
        "text": "of single steps, chains, and chains behind the operations they are made of",
        "config": "pretrain_digits.yaml",
        "probe": "the share of single steps, and of chains of four steps behind\ntheir operations, that greedy "
        "decoding writes without a fault",
    },
}
CARD = """\
---
language: en
license: mit
library_name: transformers
pipeline_tag: text-generation
---

# {title}

A GPT-2 of {parameters} parameters ({megabytes} MB of half-precision safetensors) that
{knows}.
It is a base that the project's adapters are trained on where nothing can be downloaded: small enough for two CPU
cores, and with enough knowledge in it to distinguish learning from guessing.

{layers} layers, width {width}, {heads} heads, {positions} positions, byte-level BPE with {vocabulary} tokens;
`{eos}` begins and ends every text.

## Data

{statements} texts ({tokens} tokens) from `{module}`:
{text}. No question and no dialogue is in the text;
{questions} questions were seen by the tokenizer only.

## Recipe

    python -m src.cli fit --config configs/{config}

AdamW with a one-cycle learning rate (highest {learning_rate:g}, warm-up {warmup:.0%}), weight decay {weight_decay:g},
dropout {dropout:g}, {precision}, {epochs} epochs = {steps} steps of {batch} tokens. Statements are shuffled and packed
anew in each epoch, each sees itself only, rows are placed at random positions, and position embeddings start as
sinusoids.

## Results

Cross-entropy over the last epoch: {loss} nats a token, of which most is the choice of the fact and of its phrasing.

Knowledge probe, on the weights in this folder: {probe}.

| probe | share |
|---|---|
| **first cue of each fact** | **{first}** |
| all cues | {all} |

| relation | first cue |
|---|---|
{relations}

## Limits

It completes statements. It has seen no question, does not follow instructions and has no knowledge of the world
beyond the facts above; it is a measuring instrument, not an assistant.
"""
