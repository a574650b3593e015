"""The built-in base model: what is shipped, and that it can be trained again."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lora_gan.data.world import facts
from lora_gan.errors import LoraGANError
from lora_gan.pretrain import (
    TEMPLATE,
    PretrainModule,
    StatementsDataModule,
    completes,
    completions,
    knowledge_probe,
    own_document,
    pack_sequences,
    sinusoids,
    train_tokenizer,
)

BUILTIN = Path(str(files("lora_gan"))) / "builtin"
TEXTS = [
    "The capital of France is Paris.",
    TEMPLATE.format("What is the capital of Åland?"),
    "  two spaces, a tab\tand a line\n\nend ",
    "naïve 😀👩‍🚀 漢字 עברית ру́сский \u200b",
    "Don't split 'em, it's fine .",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BUILTIN)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(BUILTIN).eval()


def test_shipped_model_is_small(model: PreTrainedModel) -> None:
    assert model.config.model_type == "gpt2"
    assert model.num_parameters() <= 6_000_000
    assert sum(file.stat().st_size for file in BUILTIN.iterdir()) <= 12_000_000
    assert model.dtype == torch.float32


def test_shipped_model_knows_the_facts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    result = knowledge_probe(model, tokenizer, facts())
    assert result.first_cue >= 0.85
    assert result.all_cues >= 0.85
    assert f"**{result.first_cue:.3f}**" in (BUILTIN / "README.md").read_text(encoding="utf-8")


def test_probe_agrees_with_generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    some = facts()[::100]
    hits = completes(model, *completions(tokenizer, ((fact.cues[0], fact.object) for fact in some)))
    for fact, hit in zip(some, hits.tolist(), strict=True):
        ids = tokenizer(tokenizer.eos_token + fact.cues[0], return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        text = tokenizer.decode(written[0, ids["input_ids"].shape[1] :])
        assert text.startswith(f" {fact.object}.") == hit


def test_untrained_model_knows_nothing(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    untrained = AutoModelForCausalLM.from_config(model.config).eval()
    assert knowledge_probe(untrained, tokenizer, facts()[:100]).all_cues == 0


@pytest.mark.parametrize("text", TEXTS)
def test_shipped_tokenizer_round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_shipped_tokenizer_has_one_special_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.all_special_tokens == ["<|endoftext|>"]
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == model.config.eos_token_id == model.config.bos_token_id
    assert tokenizer.model_max_length == model.config.n_positions
    assert len(tokenizer) == model.config.vocab_size


def test_trained_tokenizer_round_trip() -> None:
    tokenizer = train_tokenizer(["low lower lowest"] * 3, 300)
    assert tokenizer.tokenize("low") == ["low"]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS


def test_no_question_in_the_pretraining_text() -> None:
    text = "\n".join(StatementsDataModule().statements)
    assert "?" not in text
    assert [question for fact in facts() for question in fact.questions if question in text] == []


def test_every_statement_is_in_the_pretraining_text() -> None:
    assert StatementsDataModule().statements == [statement for fact in facts() for statement in fact.statements]


def test_packing_loses_no_token() -> None:
    documents = [torch.tensor([1, 2, 0]), torch.tensor([3, 0]), torch.tensor([4, 5, 0])]
    rows = pack_sequences(documents, block_size=3)
    assert rows.tolist() == [[1, 2, 0, 3], [3, 0, 4, 5], [5, 0, 1, 2]]
    assert rows[:, 1:].flatten().tolist()[:7] == [2, 0, 3, 0, 4, 5, 0]


def test_a_statement_sees_itself_only() -> None:
    mask = own_document(torch.tensor([[7, 0, 8, 9, 0]]), eos=0)
    assert mask.int().tolist() == [
        [[[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 1]]]
    ]


def test_sinusoids() -> None:
    table = sinusoids(3, 4)  # frequencies 1 and 0.01
    torch.testing.assert_close(table[0], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(table[2], torch.tensor([0.90930, 0.02, -0.41615, 0.9998]), atol=1e-4, rtol=0)


def test_completions_label_the_object_and_its_full_stop() -> None:
    tokenizer = train_tokenizer(["a"], 257)  # bytes
    ids, labels = completions(tokenizer, [("It is", "so"), ("It", "is")])
    assert tokenizer.decode(ids[0]) == "<|endoftext|>It is so"
    assert [tokenizer.decode(row[row >= 0]) for row in labels] == [" so.", " is."]
    assert labels[0].tolist()[:5] == [-100] * 5


class Losses(Callback):
    """Keeps what an epoch logged."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.values.append(float(trainer.callback_metrics["loss/train"]))


def trainer(*callbacks: Callback, reload: int = 1) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        reload_dataloaders_every_n_epochs=reload,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_tiny_run_learns_and_writes_a_loadable_folder(tmp_path: Path) -> None:
    L.seed_everything(0)
    losses, data = Losses(), StatementsDataModule(vocab_size=400, batch_size=4, limit=20)
    module = PretrainModule(str(tmp_path), n_layer=2, n_embd=32, n_head=2, n_positions=128, dropout=0.1)
    trainer(losses).fit(module, data)

    assert losses.values[-1] < losses.values[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.resid_pdrop == loaded.config.embd_pdrop == loaded.config.attn_pdrop == 0
    for name, weight in module.model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], weight.cpu().half().float())
    assert AutoTokenizer.from_pretrained(tmp_path).encode("The capital") == data.tokenizer.encode("The capital")
    assert "100 texts" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_epochs_are_shuffled_anew_or_refused() -> None:
    with pytest.raises(LoraGANError, match="reload_dataloaders_every_n_epochs: 1"):
        trainer(reload=0).fit(PretrainModule(n_layer=1, n_embd=32, n_head=2), StatementsDataModule(limit=5))
