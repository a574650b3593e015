"""Prompts with what is known about good and bad answers: sources of examples and the data module that serves them."""

from lora_gan.data.alpaca import Alpaca
from lora_gan.data.builtin import BuiltinWorld
from lora_gan.data.datamodule import InstructionDataModule
from lora_gan.data.source import RowSource, Source
from lora_gan.data.stream import StreamDataModule

__all__ = ["Alpaca", "BuiltinWorld", "InstructionDataModule", "RowSource", "Source", "StreamDataModule"]
