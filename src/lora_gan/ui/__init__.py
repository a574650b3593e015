"""Page for people: chat with the generator and its base side by side, rate their answers, see samples and report."""

from lora_gan.ui.command import ui

__all__ = ["ui"]
