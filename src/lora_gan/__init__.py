"""lora-gan: adversarial, reward-guided fine-tuning of one frozen language model with two LoRA adapters.

from lora_gan import LoraGAN
gan = LoraGAN("gpt2")
gan.step(prompt="Translate English to French: Hello world", target_text="Bonjour le monde")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_gan.api import GPT2Twin as GPT2Twin
    from lora_gan.api import LoraGAN as LoraGAN
    from lora_gan.data import InstructionDataModule as InstructionDataModule
    from lora_gan.errors import LoraGANError as LoraGANError
    from lora_gan.module import LoraGANModule as LoraGANModule
    from lora_gan.program import __version__ as __version__

_HOMES = {
    "GPT2Twin": "lora_gan.api",
    "InstructionDataModule": "lora_gan.data",
    "LoraGAN": "lora_gan.api",
    "LoraGANError": "lora_gan.errors",
    "LoraGANModule": "lora_gan.module",
    "__version__": "lora_gan.program",
}
__all__ = ["GPT2Twin", "InstructionDataModule", "LoraGAN", "LoraGANError", "LoraGANModule", "__version__"]


def __getattr__(name: str) -> object:
    """Import a public name when it is used: the package itself imports nothing."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
