"""Inference with the checkpoint of a run: interactive chat, and completions to a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from lora_gan.backbone import DISCRIMINATOR, GENERATOR, Backbone, BackboneSettings, LoraSettings
from lora_gan.checkpointing.files import read_checkpoint
from lora_gan.data.templates import as_chat, default_template
from lora_gan.data.tokenizer import prompt_ids
from lora_gan.errors import LoraGANError
from lora_gan.sampling import Sampling, eos_ids, sample
from lora_gan.tree import grow
from lora_gan.types import Example, Message

TEMPLATE = default_template("{prompt}")
# the only discriminator that needs nothing but the backbone to score
SCORED_BY = {
    "class": "AdapterDiscriminator",
    "input_format": "PromptAndCompletion",
}


@dataclass(frozen=True)
class Saved:
    """A loaded checkpoint, with the configuration and the test table of its run."""

    backbone: Backbone
    base: str
    model: dict[str, str]  # class and input format of the discriminator
    config: dict[str, Any]  # configuration of the run; empty if its file is missing
    held_out: str  # table of the test; empty if there was no test

    @property
    def scores(self) -> bool:
        """Whether the discriminator can score completions here."""
        return self.model == SCORED_BY

    def settings(self, part: str) -> dict[str, Any]:
        """The arguments of the run's ``model`` or ``data``; empty if the configuration is missing."""
        found: dict[str, Any] = (self.config.get(part) or {}).get("init_args") or {}
        return found

    def prompt(self, question: str, template: str | None = None) -> Tensor:
        """Token ids (P,) of a question, in the chat template if the run was trained with it, else in ``TEMPLATE``.

        Args:
            question: The question.
            template: Format to use instead; {prompt} stands for the question.

        Raises:
            LoraGANError: The template does not contain {prompt}.
        """
        if template is None and self.settings("data").get("chat"):
            text = as_chat(self.backbone.tokenizer, self._asked(question), self.settings("data").get("system")).prompt
        else:
            text = _filled(TEMPLATE if template is None else template, question)
        return torch.tensor(prompt_ids(self.backbone.tokenizer, text), device=self.backbone.device)

    def _asked(self, question: str) -> Example:
        """A question as a dialogue, after the system message of the data source, if it has one."""
        source = (self.settings("data").get("source") or {}).get("init_args") or {}
        system = [Message("system", source["instruction"])] if "instruction" in source else []
        return Example(question, "", messages=(*system, Message("user", question)))


def load_saved(ckpt_path: str) -> Saved:
    """Load a checkpoint: base, both adapters and the discriminator's head.

    Raises:
        LoraGANError: There is no such file, it is damaged, or it was not written by lora-gan.
    """
    checkpoint = read_checkpoint(ckpt_path)
    described = checkpoint.get("lora_gan")
    if described is None:
        raise LoraGANError(f"{ckpt_path} was not written by lora-gan")
    lora = {role: LoraSettings(**described["lora"][role]) for role in (GENERATOR, DISCRIMINATOR)}
    backbone = Backbone(described["base"], lora[GENERATOR], lora[DISCRIMINATOR], BackboneSettings(described["dtype"]))
    prefix = "backbone."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    backbone.load_state_dict(weights, strict=False)
    if torch.cuda.is_available():
        backbone.to("cuda")
    run = Path(ckpt_path).absolute().parents[1]
    config, held_out = run / "config.yaml", run / "held_out.md"
    return Saved(
        backbone,
        described["base"],
        described["model"],
        yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {},
        held_out.read_text(encoding="utf-8").strip() if held_out.is_file() else "",
    )


def load_backbone(ckpt_path: str) -> Backbone:
    """Load the backbone of a checkpoint; raises as :func:`load_saved`."""
    return load_saved(ckpt_path).backbone


def chat(
    ckpt_path: str,
    template: str | None = None,
    compare: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    do_sample: bool = False,
) -> None:
    """Chat with the generator; an empty line ends it. The discriminator's score follows each completion.

    Args:
        ckpt_path: Checkpoint of a run.
        template: Format of a prompt; {prompt} stands for the question. By default the tokenizer's chat template if the
            run was trained with it (data.chat), else "### Prompt: … ### Response:".
        compare: Show the completion of the base as well.
        max_new_tokens: Length limit of a completion.
        temperature: Divides the logits when sampling.
        do_sample: Sample tokens instead of taking the most likely ones.
    """
    saved = load_saved(ckpt_path)
    backbone = saved.backbone
    how = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, do_sample=do_sample)
    if not saved.scores:
        model = "{class} that reads {input_format}".format(**saved.model)
        print(
            f"no scores: the discriminator of this run is a {model}; use predict for completions with rewards",
            flush=True,
        )
    modes: dict[str, Callable[[], AbstractContextManager[None]]] = {"generator": backbone.generator}
    if compare:
        modes = {"base": backbone.reference, **modes}
    while question := _read():
        prompt = saved.prompt(question, template)
        for name, mode in modes.items():
            print(f"{name:<11}" if compare else "", end="", flush=True)
            with mode():
                completion = _stream(backbone, prompt, how)
            score = f"   (discriminator {score_of(backbone, prompt, completion):.2f})" if saved.scores else ""
            print(score, flush=True)


def generate(
    ckpt_path: str,
    input: str,
    output: str = "completions.jsonl",
    template: str | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    do_sample: bool = False,
    seed: int = 0,
) -> None:
    """Complete the prompts of a file; write JSON lines of prompt, completion and the discriminator's score.

    Args:
        ckpt_path: Checkpoint of a run.
        input: Text file with a prompt on each line, or .jsonl file whose rows have a "prompt"; other fields are kept.
        output: File to write.
        template: Format of a prompt, with the default of chat; "{prompt}" leaves the prompts unchanged.
        batch_size: Prompts completed at once.
        max_new_tokens: Length limit of a completion.
        temperature: Divides the logits when sampling.
        top_p: Draw from the smallest set of tokens with at least this mass.
        do_sample: Sample tokens instead of taking the most likely ones.
        seed: Seed of the sampling.
    """
    rows = _rows(Path(input))
    if batch_size < 1:
        raise LoraGANError(f"batch_size must be at least 1, got {batch_size}")
    how = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, do_sample=do_sample)
    saved = load_saved(ckpt_path)
    backbone = saved.backbone
    torch.manual_seed(seed)
    with Path(output).open("w", encoding="utf-8") as stream:
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            prompts = [saved.prompt(row["prompt"], template) for row in part]
            with backbone.generator():
                rollout = sample(backbone, prompts, 1, how)
            for row, prompt, text, ids in zip(part, prompts, rollout.texts, rollout.completion_ids, strict=True):
                score = {"score": score_of(backbone, prompt, ids)} if saved.scores else {}
                stream.write(json.dumps({**row, "completion": text, **score}, ensure_ascii=False) + "\n")
            stream.flush()
    print(f"{len(rows)} completions written to {output}")


@torch.no_grad()
def score_of(backbone: Backbone, prompt: Tensor, completion: Tensor) -> float:
    """The discriminator's score of a completion (T,) to a prompt (P,); as in training, the completion ends in EOS."""
    eos = completion.new_tensor([backbone.tokenizer.eos_token_id])
    ended = torch.cat(
        [completion[:-1] if len(completion) and int(completion[-1]) in eos_ids(backbone) else completion, eos]
    )
    with backbone.discriminator():
        return float(backbone.score_branches(grow([prompt], {"completion": [[ended]]}))["completion"][0, 0])


def _filled(template: str, question: str) -> str:
    if "{prompt}" not in template:
        raise LoraGANError(
            f"the template {template!r} does not contain {{prompt}}; write {{prompt}} where the question belongs"
        )
    return template.replace("{prompt}", question)


def _stream(backbone: Backbone, prompt: Tensor, how: Sampling) -> Tensor:
    """Generate a completion in the active mode and print it token by token; returns its ids (T,)."""
    if len(prompt) + how.max_new_tokens > backbone.context_length:
        raise LoraGANError(
            f"the prompt has {len(prompt)} tokens; with max_new_tokens {how.max_new_tokens} that is more than the "
            f"model's context of {backbone.context_length}: lower max_new_tokens or shorten the prompt"
        )
    ends = eos_ids(backbone)
    drawn = {"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k} if how.do_sample else {}
    with torch.no_grad():
        ids: Tensor = backbone.causal_lm.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            max_new_tokens=how.max_new_tokens,
            do_sample=how.do_sample,
            repetition_penalty=1.0,
            eos_token_id=ends,
            pad_token_id=ends[0],
            streamer=_Printer(backbone.tokenizer),
            **drawn,
        )
    return ids[0, len(prompt) :]


class _Printer(BaseStreamer):  # type: ignore[misc]
    """Prints the text that each token adds, as soon as its characters are complete."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] | None = None  # None: the first call passes the prompt
        self.shown = 0

    def put(self, value: Tensor) -> None:
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        self._show(self.tokenizer.decode(self.ids, skip_special_tokens=True), "\ufffd")

    def end(self) -> None:
        self._show(self.tokenizer.decode(self.ids or [], skip_special_tokens=True))

    def _show(self, text: str, *waits: str) -> None:
        if not text.endswith(waits):
            print(text[self.shown :], end="", flush=True)
            self.shown = len(text)


def _read() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of prompts."""
    if not path.is_file():
        raise LoraGANError(f"no file {path}; give a text file with a prompt on each line, or a .jsonl file")
    rows = list(_read_rows(path))
    if not rows:
        raise LoraGANError(f"{path} contains no prompts; write one on each line")
    return rows


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            yield {"prompt": line}
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise LoraGANError(f"{path}, line {number} is not valid JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise LoraGANError(f'{path}, line {number} has no "prompt"; each row looks like {{"prompt": "…"}}')
        yield row
