"""Prompts with what is known about good and bad answers: sources of examples and the data module that serves them."""

from lora_gan.data.alpaca import Alpaca
from lora_gan.data.arc import ARC
from lora_gan.data.builtin import BuiltinWorld
from lora_gan.data.datamodule import InstructionDataModule
from lora_gan.data.dolly import Dolly
from lora_gan.data.mixture import Mixture
from lora_gan.data.oasst import OASST
from lora_gan.data.own import OwnFile
from lora_gan.data.source import RowSource, Source
from lora_gan.data.stream import StreamDataModule
from lora_gan.data.truthfulqa import TruthfulQA
from lora_gan.data.twon import TWON

__all__ = [
    "ARC",
    "OASST",
    "TWON",
    "Alpaca",
    "BuiltinWorld",
    "Dolly",
    "InstructionDataModule",
    "Mixture",
    "OwnFile",
    "RowSource",
    "Source",
    "StreamDataModule",
    "TruthfulQA",
]
