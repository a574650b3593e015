"""Mistakes in an own source, DataModule or step are named where they are made, without a traceback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
from torch.utils.data import DataLoader

from lora_gan import LoraGAN
from lora_gan.data import InstructionDataModule, Mixture, Source
from lora_gan.data.sources.standard import Rows
from lora_gan.errors import DataError, LoraGANError
from lora_gan.types import Example, Message, Negative
from tests.helpers.steps import Build

wrong: Any = None  # what a type checker would refuse


class Own(Source):
    def __init__(self, examples: Any) -> None:
        super().__init__()
        self.examples = examples

    def rows(self) -> Any:
        return self.examples


def example(**fields: Any) -> Any:
    return Example(**{"prompt": "Q?", "target": "A", **fields})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (wrong, r"the source own: rows\(\) returned None; return a list of Example"),
        (["Q?"], r"the source own, example 1 is str 'Q\?', not lora_gan.types.Example"),
        ([example(), None], "the source own, example 2 is None, not"),
        ([example(target=3)], "example 1: its target is int '3', not text"),
        ([example(target=None)], "its target is None, not text; write a text, an empty one where there is none"),
        ([example(group=7)], "its group is int '7', not text"),
        ([example(negatives=("bad",))], r"its negatives hold str 'bad'; write each of them as Negative\(text, kind="),
        ([example(negatives=(Negative(wrong, "own"),))], "the text of a negative is None, not text"),
        ([example(references="abc")], "its references are str 'abc'; give a tuple of them, each as a text"),
        ([example(messages=(("user", "Q?"),))], r"its messages hold tuple .*; write each of them as Message\("),
        ([example(prompt="a \ud800 b")], r"its prompt holds half of a character, '\\ud800' at 2, .*files.clean"),
        ([example(references=("A", "\udfff"))], "a reference holds half of a character"),
        ([example(messages=(Message("user", "\ud800"),))], "the content of a message holds half of a character"),
        ([example(prompt="")], r"every prompt of .*own is empty, so there is nothing to complete"),
    ],
)
def test_an_example_of_an_own_source_that_cannot_be_used_is_named(given: Any, message: str) -> None:
    for source in (Own(given), Mixture([Own(given)])):
        with pytest.raises(DataError, match=message):
            InstructionDataModule(source).setup()


def test_rows_in_memory_that_are_no_dictionaries_are_named() -> None:
    given: Any = ["Q?"]
    with pytest.raises(DataError, match=r'row 1 is str, not a dictionary such as \{"prompt": "…", "completion": "…"\}'):
        list(Rows(given).rows())


def test_half_of_a_character_in_a_step_is_named() -> None:
    gan = LoraGAN("builtin", lambda response, target: 0.0)
    for prompt, target in (("a \ud800", "b"), ("a", "b \udc00")):
        with pytest.raises(LoraGANError, match="holds half of a character"):
            gan.step(prompt, target)


def test_batches_of_another_collate_function_are_named(build: Build) -> None:
    class Dictionaries(L.LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader([{"prompt_ids": 1}])  # type: ignore[arg-type]

        val_dataloader: Callable[[Any], Any] = train_dataloader
        predict_dataloader: Callable[[Any], Any] = train_dataloader

    trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    for start in (trainer.fit, trainer.validate, trainer.predict):
        with pytest.raises(DataError, match=r"a batch of type dict, not .*; set its collate_fn"):
            start(build(), datamodule=Dictionaries())
