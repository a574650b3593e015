"""What a run leaves behind and how to use it: adapters, chat, export."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from lora_gan.backbone import DISCRIMINATOR, GENERATOR, Backbone, LoraSettings
from lora_gan.checkpoint_files import read_checkpoint
from lora_gan.errors import LoraGANError
from lora_gan.sampling import Sampling, sample
from lora_gan.tree import grow

TEMPLATE = "### Prompt:\n{prompt}\n\n### Response:\n"


def write_adapters(module: Any, run: Path) -> None:
    """Write both adapters under ``run/adapters`` in PEFT's format, each loadable by ``PeftModel.from_pretrained``."""
    for player in (GENERATOR, DISCRIMINATOR):
        save_adapter(module.backbone, player, run / "adapters" / player)
    judge = module.discriminator.judge
    own = {name for name, parameter in judge.named_parameters() if parameter.requires_grad}
    if own:
        weights = {name: tensor for name, tensor in judge.state_dict().items() if name in own}
        torch.save(weights, run / "adapters" / DISCRIMINATOR / "judge.pt")


def save_adapter(backbone: Backbone, player: str, folder: Path) -> None:
    """Write one adapter; PEFT puts a named adapter into a folder of its name, which is taken out of it here."""
    backbone.lm.save_pretrained(str(folder), selected_adapters=[player])
    for file in (folder / player).iterdir():
        shutil.move(str(file), folder / file.name)
    (folder / player).rmdir()
    if player == DISCRIMINATOR:
        torch.save(backbone.judge_head.state_dict(), folder / "head.pt")


def load_backbone(ckpt_path: str) -> Backbone:
    """The backbone of a checkpoint: its base, both adapters and the head.

    Raises:
        LoraGANError: There is no such file, it is damaged, or it is not a checkpoint of this project.
    """
    checkpoint = read_checkpoint(ckpt_path)
    described = checkpoint.get("lora_gan")
    if described is None:
        raise LoraGANError(f"{ckpt_path} was not written by lora-gan")
    lora = {player: LoraSettings(**described[player]) for player in (GENERATOR, DISCRIMINATOR)}
    backbone = Backbone(described["base"], lora[GENERATOR], lora[DISCRIMINATOR], described["dtype"])
    prefix = "backbone."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    backbone.load_state_dict(weights, strict=False)
    return backbone


def chat(
    ckpt_path: str,
    template: str = TEMPLATE,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    do_sample: bool = False,
) -> None:
    """Ask the generator; an empty line ends. The discriminator's score stands behind each answer.

    Args:
        ckpt_path: Checkpoint of a run.
        template: How a question becomes a prompt; {prompt} is the question.
        max_new_tokens: Length limit of an answer.
        temperature: Divides the logits when sampling.
        do_sample: Draw answers instead of taking the most likely tokens.
    """
    backbone = load_backbone(ckpt_path)
    how = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, do_sample=do_sample)
    while question := _read():
        text = template.replace("{prompt}", question)
        prompt = torch.tensor(backbone.tokenizer.encode(text, add_special_tokens=False))
        with backbone.generator():
            rollout = sample(backbone, [prompt], 1, how)
        with backbone.discriminator(), torch.no_grad():
            score = backbone.judge(grow([prompt], {"answer": [[rollout.answer_ids[0]]]}))["answer"][0, 0].item()
        print(f"{rollout.texts[0]}   (discriminator {score:.2f})", flush=True)


def _read() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def export(ckpt_path: str, output: str = "exported", merge: bool = False) -> None:
    """Write the generator of a checkpoint as a PEFT adapter or, merged with its base, as a plain model.

    Args:
        ckpt_path: Checkpoint of a run.
        output: Folder to write.
        merge: Write base + adapter as one model that plain transformers loads.
    """
    backbone = load_backbone(ckpt_path)
    if merge:
        with backbone.generator():
            backbone.lm.merge_and_unload(adapter_names=[GENERATOR]).save_pretrained(output)
    else:
        save_adapter(backbone, GENERATOR, Path(output))
    backbone.tokenizer.save_pretrained(output)
    print(f"written to {output}")
