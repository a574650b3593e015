"""Prompts with what is known about good and bad completions: sources of examples and the data module that serves
them.
"""

from lora_gan.data.datamodule import InstructionDataModule
from lora_gan.data.source import RowSource, Source
from lora_gan.data.sources.alpaca import Alpaca
from lora_gan.data.sources.arc import ARC
from lora_gan.data.sources.builtin import BuiltinWorld
from lora_gan.data.sources.digit_chains import DigitChains
from lora_gan.data.sources.dolly import Dolly
from lora_gan.data.sources.mixture import Mixture
from lora_gan.data.sources.oasst import OASST
from lora_gan.data.sources.own import OwnFile
from lora_gan.data.sources.standard import StandardFormat
from lora_gan.data.sources.truthfulqa import TruthfulQA
from lora_gan.data.sources.twon import TWON
from lora_gan.data.stream import StreamDataModule

__all__ = [
    "ARC",
    "OASST",
    "TWON",
    "Alpaca",
    "BuiltinWorld",
    "DigitChains",
    "Dolly",
    "InstructionDataModule",
    "Mixture",
    "OwnFile",
    "RowSource",
    "Source",
    "StandardFormat",
    "StreamDataModule",
    "TruthfulQA",
]
