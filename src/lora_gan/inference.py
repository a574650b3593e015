"""Inference with the checkpoint of a run: interactive chat, and completions to a file."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.cli import instantiate_class
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lora_gan.atomic import atomic_file, check_file_writable
from lora_gan.backbone import DISCRIMINATOR, GENERATOR, SNAPSHOT, Backbone, BackboneSettings, LoraSettings, adapter_of
from lora_gan.best_of import WAYS, BestOf, agreement, choose
from lora_gan.checkpointing.files import intact_checkpoint, newest_run, read_checkpoint
from lora_gan.checkpointing.state import CHECKPOINT_VERSION, vocabulary_of
from lora_gan.data.dialogues import dialogue
from lora_gan.data.files import FORMATS, Row, clean, read_lines, read_rows
from lora_gan.data.templates import PromptFormat
from lora_gan.data.tokenizer import prompt_ids
from lora_gan.discriminator.models import AdapterDiscriminator, DiscriminatorModel
from lora_gan.discriminator.restored import restore, score
from lora_gan.errors import LoraGANError
from lora_gan.final_answer import FinalAnswer
from lora_gan.number_formats import default_device, use_tensor_cores
from lora_gan.rewards import Reward, default_rewards, weighted_sum
from lora_gan.sampling import Sampling, end_turns, eos_ids, sample
from lora_gan.tree import grow
from lora_gan.types import Example, Message, PromptBatch, RewardContext, Rollout

log = logging.getLogger("lora_gan")

STDOUT = ("-", "/dev/stdout")
RUNS = "lightning_logs"  # where runs lie by default
COMMANDS = """/reset forgets the conversation
/base switches between the trained generator and its base
/temperature 0.7 samples at this temperature; 0 takes the most likely token each time
/quit ends the chat, as an empty line does"""


# a saved run


@dataclass(frozen=True)
class Saved:
    """A loaded checkpoint, with the configuration of its run."""

    path: Path  # of the checkpoint
    step: int  # training steps that its weights have learned in
    backbone: Backbone
    base: str
    model: Mapping[str, str]  # class and input format of the discriminator
    prompts: PromptFormat
    sampling: Sampling
    config: Mapping[str, Any]  # configuration of the run; empty if its file is missing
    weights: Mapping[str, Tensor]  # what it has trained, by the names of the module

    @property
    def scores(self) -> bool:
        """Whether the discriminator can score completions here."""
        return not self.no_scores

    @property
    def no_scores(self) -> str:
        """Why the discriminator cannot score completions here; empty if it can."""
        return self._discriminator if isinstance(self._discriminator, str) else ""

    @cached_property
    def _discriminator(self) -> DiscriminatorModel | str:
        """The discriminator, or why it cannot score completions here."""
        chosen = (self.settings("model").get("discriminator") or {}).get("model")
        try:
            model: DiscriminatorModel = (
                AdapterDiscriminator() if chosen is None else _built(DiscriminatorModel, chosen, "discriminator")
            )
            restore(model, self.model, self.weights, self.backbone)
        except LoraGANError as error:
            return str(error)
        return model

    @torch.no_grad()
    def score(self, prompts: Sequence[Tensor], completions: Sequence[Sequence[Tensor]]) -> Tensor:
        """(N,) the discriminator's scores of completions (T,), some for each of B prompts (P,).

        As in training, a completion ends in EOS.

        Raises:
            LoraGANError: It cannot score completions here.
        """
        if isinstance(self._discriminator, str):
            raise LoraGANError(self._discriminator)
        ended = [[_ended(self.backbone, one) for one in row] for row in completions]
        return score(self._discriminator, self.backbone, prompts, ended)

    @cached_property
    def final_answer(self) -> FinalAnswer | None:
        """How the run finds the final answer in a completion; None where it has no such setting."""
        chosen = self.settings("model").get("final_answer")
        if not chosen:
            return None
        try:
            found: FinalAnswer = instantiate_class((), chosen)
        except (ImportError, AttributeError) as error:
            raise LoraGANError(
                f"the final_answer of this run, {chosen['class_path']}, cannot be imported ({error}); start from the "
                "folder that holds it"
            ) from error
        return found

    def answer_after_work(self, text: str) -> str | None:
        """The final answer in a completion where work stands before it; None where the run looks for none."""
        find = self.final_answer
        found = find(text) if find is not None else None
        return found if find is not None and found is not None and find.work(text).strip() else None

    @cached_property
    def rewards(self) -> list[Reward]:
        """The run's rewards; the default ones where it names none."""
        chosen = self.settings("model").get("rewards")
        if chosen is None:
            return default_rewards()
        found: list[Reward] = _built(list[Reward], chosen, "rewards", "them")
        return found

    def settings(self, part: str) -> dict[str, Any]:
        """The arguments of the run's ``model`` or ``data``; empty if the configuration is missing."""
        found: dict[str, Any] = (self.config.get(part) or {}).get("init_args") or {}
        return found

    def question(self, text: str, template: str | None = None) -> Example:
        """A question as an example of the run, or in a template of its own, where {prompt} stands for the question.

        Raises:
            LoraGANError: The template does not contain {prompt}, or that of the run has several fields.
        """
        if template is None:
            return self.prompts.asked(clean(text))
        if "{prompt}" not in template:
            raise LoraGANError(
                f"the template {template!r} does not contain {{prompt}}; write {{prompt}} where the question belongs"
            )
        whole = text.encode(errors="ignore").decode()  # without lone surrogates, which no tokenizer can read
        return Example(template.replace("{prompt}", whole), "")

    def prompt(self, example: Example) -> Tensor:
        """Token ids (P,) of the prompt of an example, written as in training.

        Raises:
            LoraGANError: The prompt is empty, or the chat template cannot write it.
        """
        tokenizer = self.backbone.tokenizer
        written = self.prompts.write(tokenizer, example) if example.messages else example
        return torch.tensor(prompt_ids(tokenizer, [written])[0], device=self.backbone.device)


def _built(kind: Any, chosen: Any, name: str, held: str = "it") -> Any:
    """What a run's configuration names.

    Raises:
        LoraGANError: It cannot be built here.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{name}", type=kind)
    try:
        return parser.instantiate_classes(parser.parse_object({name: chosen}))[name]
    except ArgumentError as error:
        raise LoraGANError(
            f"the {name} of this run cannot be built: {error}; start from the folder that holds {held}"
        ) from error


def load_saved(ckpt_path: str, base: str | None = None, dequantize: bool = False) -> Saved:
    """Load a checkpoint: base, in the number format of its run, both adapters and the discriminator's head.

    Args:
        ckpt_path: Its path, or "last" for the newest in ``lightning_logs``.
        base: Where its base is now, if it has moved.
        dequantize: Load a base that was quantised in training as it was before.

    Raises:
        LoraGANError: There is no such file, it is damaged or was not written by this lora-gan, or its base is missing
            or another one than in training.
    """
    path = _newest() if ckpt_path == "last" else Path(ckpt_path)
    checkpoint = read_checkpoint(path)
    described = checkpoint.get("lora_gan")
    if described is None:
        raise LoraGANError(f"{path} was not written by lora-gan")
    if described["version"] != CHECKPOINT_VERSION:
        raise LoraGANError(
            f"{path} has format version {described['version']}, this lora-gan reads {CHECKPOINT_VERSION}; use the "
            "lora-gan that wrote it"
        )
    backbone = _load_base(described, base, None if dequantize else _quantization(described))
    prefix = "backbone."
    state = checkpoint["state_dict"]
    if any(adapter_of(name) == SNAPSHOT for name in state):
        backbone.add_snapshot()
    weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    backbone.load_state_dict(weights, strict=False)
    use_tensor_cores(default_device())
    backbone.to(default_device())
    prompts = PromptFormat(**described["prompts"] | {"templates": tuple(described["prompts"]["templates"])})
    end_turns(backbone, prompts)
    return Saved(
        path,
        checkpoint["global_step"],
        backbone,
        base or described["base"],
        described["model"],
        prompts,
        Sampling(**described["sampling"]),
        _configuration_of(path),
        {name: value for name, value in state.items() if not name.startswith(prefix)},
    )


def _newest() -> Path:
    """The newest checkpoint of the run that wrote one last."""
    last = newest_run(Path(RUNS), "**")
    if last is None:
        raise LoraGANError(f"no run with a checkpoint in {Path(RUNS).absolute()}; give the checkpoint's path")
    newest = intact_checkpoint(last)
    log.info("checkpoint: %s", newest)
    return newest


def _quantization(described: Mapping[str, Any]) -> str | None:
    """That of the base in training.

    Raises:
        LoraGANError: It needs a GPU, and there is none.
    """
    quantization: str | None = described["quantization"]
    if quantization is not None and not torch.cuda.is_available():
        raise LoraGANError(
            f"the base of this checkpoint was quantised to {quantization}, which needs a CUDA GPU, and none was found; "
            f"--dequantize true loads it in {described['dtype']} instead, with nearly the same completions"
        )
    return quantization


def _load_base(described: Mapping[str, Any], moved: str | None, quantization: str | None) -> Backbone:
    """The base of a checkpoint with new adapters, once it is known to be the same."""
    name = moved or described["base"]
    lora = {role: LoraSettings(**described["lora"][role]) for role in (GENERATOR, DISCRIMINATOR)}
    try:
        settings = BackboneSettings(described["dtype"], quantization)
        backbone = Backbone(name, lora[GENERATOR], lora[DISCRIMINATOR], settings)
    except LoraGANError as error:
        if moved:
            raise
        raise LoraGANError(
            f"the base of the checkpoint, {name!r}, cannot be loaded (working directory {Path.cwd()}): {error}\n"
            "If it has moved, say where it is now with --base"
        ) from error
    there, here = described["fingerprint"], backbone.fingerprint
    weights_differ = there["format"] == here["format"] and there["weights"] != here["weights"]
    if weights_differ or described["vocabulary"] != vocabulary_of(backbone):
        raise LoraGANError(
            f"{name!r} has other {'weights' if weights_differ else 'tokens'} than the base of the checkpoint's run, "
            f"{described['base']!r}; say where that base is with --base, or train again on this one"
        )
    return backbone


def _configuration_of(path: Path) -> dict[str, Any]:
    """The configuration of the run, where the checkpoint is still in its folder."""
    try:
        found = yaml.safe_load((path.absolute().parents[1] / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    ours = isinstance(found, dict) and all(isinstance(found.get(part), dict) for part in ("model", "data"))
    return found if ours else {}  # else it is another program's


# chat


def chat(
    ckpt_path: str,
    base: str | None = None,
    template: str | None = None,
    compare: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    dequantize: bool = False,
    best_of: int = 1,
    best_by: str = "agreement",
) -> None:
    """Chat with the generator; an empty line ends it. The discriminator's score follows each completion.

    So does the final answer, where the run has a final_answer and work stands before it.

    Prompts are written as in training. A question continues the conversation if the run was trained with a chat
    template or on dialogues. Instead of a question, /reset, /base, /temperature 0.7 and /quit are commands.

    Args:
        ckpt_path: Checkpoint of a run, or "last" for the newest one in lightning_logs.
        base: Folder or hub id of the base, if it has moved since the training.
        template: Format of a prompt instead of that of the run; {prompt} stands for the question.
        compare: Show the completion of the base as well.
        max_new_tokens: Length limit of a completion.
        temperature: Samples at this temperature, 1 as in training; 0 takes the most likely token each time.
        dequantize: Load a base that was quantised in training as it was before, as on a machine without a GPU.
        best_of: Completions that are sampled for each question, of which the best one is shown.
        best_by: Which one that is: by agreement, logprob, discriminator or reward, see generate.
    """
    best = BestOf(best_of, best_by)
    how = sampling_at(temperature, best, max_new_tokens=max_new_tokens)
    saved = load_saved(ckpt_path, base, dequantize)
    check_way(saved, best)
    session = _Session(saved, how, template, compare, best)
    print(session.opening(), flush=True)
    while (line := _read()) and session.take(line):
        pass


def sampling_at(temperature: float, best: BestOf, max_new_tokens: int, top_p: float = 1.0) -> Sampling:
    """Settings of sampling, where a temperature of 0 is greedy decoding.

    Raises:
        LoraGANError: A setting is out of its range, or has no effect at temperature 0.
    """
    if best.n > 1 and not temperature:
        raise LoraGANError(
            f"best_of {best.n} needs different completions, and at temperature 0, the default, all are the same; set "
            "a temperature, such as 1"
        )
    if top_p < 1 and not temperature:
        raise LoraGANError(f"top_p {top_p} has no effect at temperature 0, the default; set a temperature, such as 1")
    return Sampling(max_new_tokens, temperature=temperature or 1.0, top_p=top_p, do_sample=temperature != 0)


class _Session:
    """A chat: settings that commands change, and the conversation with each of the models that answer."""

    def __init__(self, saved: Saved, how: Sampling, template: str | None, compare: bool, best: BestOf) -> None:
        self.saved, self.how, self.template, self.best = saved, how, template, best
        self.models = ["base", "generator"] if compare else ["generator"]
        self.keeps = template is None and saved.prompts.keeps_dialogue
        self.turns: dict[str, list[Message]] = {"base": [], "generator": []}

    def opening(self) -> str:
        """What a user has to know at the start."""
        kept = "the conversation is kept" if self.keeps else "each question is asked alone, as in training"
        scores = [f"no scores: {self.saved.no_scores}"] * (not self.saved.scores)
        return "\n".join([f"{kept}; /reset, /base, /temperature, /quit", *scores])

    def take(self, line: str) -> bool:
        """Answer a question or obey a command; False ends the chat."""
        name, _, value = line.partition(" ")
        if name == "/quit":
            return False
        if name == "/reset":
            self._reset()
        elif name == "/base":
            self.models = ["generator"] if self.models == ["base"] else ["base"]
            print(f"now the {self.models[0]} answers")
        elif name == "/temperature":
            self._set_temperature(value)
        elif name.startswith("/") and name[1:].isalpha() and not value:
            print(COMMANDS)
        else:
            self._answer(line)
        return True

    def _reset(self) -> None:
        for turns in self.turns.values():
            turns.clear()
        print("a new conversation")

    def _set_temperature(self, value: str) -> None:
        try:
            given = float(value)
            if self.best.n > 1 and not given:
                print(f"at temperature 0 all of the {self.best.n} completions would be the same; take one above 0")
                return
            self.how = replace(self.how, temperature=given or 1.0, do_sample=given != 0)
        except (ValueError, LoraGANError) as error:
            print(f"/temperature takes a number from 0, such as /temperature 0.7 ({error})")

    def _answer(self, question: str) -> None:
        backbone = self.saved.backbone
        modes: dict[str, Callable[[], AbstractContextManager[None]]]
        modes = {"base": backbone.reference, "generator": backbone.generator}
        for name in self.models:
            print(f"{name:<11}" if len(self.models) > 1 else "", end="", flush=True)
            asked = self.saved.question(question, self.template)
            prompt, forgotten = prompt_after(self.saved, self.turns[name], asked, self.how.max_new_tokens)
            if forgotten:
                del self.turns[name][:forgotten]
                print("(the oldest turns no longer fit into the context and are forgotten)")
            with modes[name]():
                completion, text = self._completion(prompt)
            print(self._notes(prompt, completion, text), flush=True)
            if self.keeps:
                self.turns[name] += [*asked.messages[-1:], Message("assistant", clean(text))]

    def _completion(self, prompt: Tensor) -> tuple[Tensor, str]:
        """The completion in the active mode, shown: its ids (T,) and its text."""
        if self.best.n == 1:
            return _stream(self.saved.backbone, prompt, self.how)
        rollout = sample_best(self.saved, [prompt], self.how, self.best)
        print(rollout.texts[0], end="", flush=True)
        return rollout.completion_ids[0], rollout.texts[0]

    def _notes(self, prompt: Tensor, completion: Tensor, text: str) -> str:
        """What follows a completion: its final answer, where work stands before it, and the discriminator's score."""
        found = self.saved.answer_after_work(text)
        notes = [f"final answer {found}"] * (found is not None)
        if self.saved.scores:
            notes.append(f"discriminator {self.saved.score([prompt], [[completion]]).item():.2f}")
        return f"   ({', '.join(notes)})" * bool(notes)


def prompt_after(saved: Saved, turns: Sequence[Message], asked: Example, new_tokens: int) -> tuple[Tensor, int]:
    """Token ids (P,) of a question after as many of the turns as fit into the context.

    Args:
        saved: Its prompts can have earlier turns, or there are none.
        turns: Questions, each with its answer.
        asked: The question.
        new_tokens: Length of the completion, which has to fit, too.

    Returns:
        The prompt, and how many of the turns, the oldest, it leaves out.
    """
    for forgotten in range(0, len(turns), 2):
        prompt = saved.prompt(saved.prompts.dialogue([*turns[forgotten:], *asked.messages]))
        if len(prompt) + new_tokens <= saved.backbone.context_length:
            return prompt, forgotten
    return saved.prompt(asked), len(turns)


def check_way(saved: Saved, best: BestOf) -> None:
    """Refuse a way of choosing that a run does not offer.

    Raises:
        LoraGANError: The discriminator cannot score completions here, or the run has no reward.
    """
    others = f"choose {' or '.join(way for way in WAYS if way != best.by)} with --best_by"
    if best.n > 1 and best.by == "discriminator" and not saved.scores:
        raise LoraGANError(f"{saved.no_scores}; {others}")
    if best.n > 1 and best.by == "reward" and not saved.rewards:
        raise LoraGANError(f"this run has no reward; {others}")


def sample_best(
    saved: Saved,
    prompts: Sequence[Tensor],
    how: Sampling,
    best: BestOf,
    on_tokens: Callable[[Tensor], None] | None = None,
) -> Rollout:
    """The best of n completions of the active mode to each of B prompts; ``on_tokens`` is that of :func:`sample`.

    Raises:
        LoraGANError: All rewards of the run need a target.
    """
    rollout = sample(saved.backbone, prompts, best.n, how, on_tokens=on_tokens)
    if best.n == 1:
        return rollout
    likely = rollout.logprobs.sum(-1)
    return rollout.chosen(choose(SCORES[best.by](saved, prompts, rollout), likely, best.n))


def _by_agreement(saved: Saved, prompts: Sequence[Tensor], rollout: Rollout) -> Tensor:
    return agreement(rollout.texts, rollout.num_generations, saved.final_answer)


def _by_logprob(saved: Saved, prompts: Sequence[Tensor], rollout: Rollout) -> Tensor:
    return rollout.logprobs.sum(-1)


def _by_discriminator(saved: Saved, prompts: Sequence[Tensor], rollout: Rollout) -> Tensor:
    return saved.score(prompts, rollout.by_prompt(len(prompts)))


@torch.no_grad()
def _by_reward(saved: Saved, prompts: Sequence[Tensor], rollout: Rollout) -> Tensor:
    tokenizer = saved.backbone.tokenizer
    asked = tuple(Example(tokenizer.decode(prompt, skip_special_tokens=True), "") for prompt in prompts)
    nothing = tuple(prompt[:0] for prompt in prompts)
    batch = PromptBatch(asked, tuple(prompts), nothing, ((),) * len(asked))
    tree = grow(prompts, {"sampled": rollout.by_prompt(len(prompts))})
    with saved.backbone.reference():
        logprobs = saved.backbone.logprobs(tree)["sampled"]
    context = RewardContext(rollout.num_generations, logprobs, rollout.mask, saved.final_answer)
    found = weighted_sum(saved.rewards, rollout.texts, batch, context)
    if not any(bool(applies.any()) for applies in found.applies.values()):
        names = ", ".join(reward.name for reward in saved.rewards)
        raise LoraGANError(
            f"the rewards of this run ({names}) need a target, and a prompt here has none; choose another way with "
            "--best_by"
        )
    return found.total


SCORES: Mapping[str, Callable[[Saved, Sequence[Tensor], Rollout], Tensor]] = {
    "agreement": _by_agreement,
    "logprob": _by_logprob,
    "discriminator": _by_discriminator,
    "reward": _by_reward,
}


def _ended(backbone: Backbone, completion: Tensor) -> Tensor:
    """A completion (T,) with EOS at its end, in place of another token that ends it."""
    eos = completion.new_tensor([backbone.tokenizer.eos_token_id])
    done = len(completion) and int(completion[-1]) in eos_ids(backbone)
    return torch.cat([completion[:-1] if done else completion, eos])


def _stream(backbone: Backbone, prompt: Tensor, how: Sampling) -> tuple[Tensor, str]:
    """Generate a completion in the active mode and print it token by token; returns its ids (T,) and its text."""
    printer = _Printer(backbone.tokenizer)
    rollout = sample(backbone, [prompt], 1, how, on_tokens=printer.put)
    printer.end()
    return rollout.completion_ids[0], rollout.texts[0]


class _Printer:
    """Prints the text that each token adds, as soon as its characters are complete."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = 0

    def put(self, tokens: Tensor) -> None:
        self.ids += tokens.tolist()
        self._show(self.tokenizer.decode(self.ids, skip_special_tokens=True), "\ufffd")

    def end(self) -> None:
        self._show(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _show(self, text: str, *waits: str) -> None:
        if not text.endswith(waits):
            print(text[self.shown :], end="", flush=True)
            self.shown = len(text)


def _read() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


# completions to a file


def generate(
    ckpt_path: str,
    input: str,
    output: str = "completions.jsonl",
    base: str | None = None,
    template: str | None = None,
    output_key: str = "completion",
    batch_size: int = 16,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    dequantize: bool = False,
    best_of: int = 1,
    best_by: str = "agreement",
) -> None:
    """Complete the prompts of a file; write JSON lines of the rows with the completion and the discriminator's score.

    A run with a final_answer adds the final answer of the completion, null where it has none.

    Prompts are written as in training. The output may be the input: it is replaced once all is written.

    Args:
        ckpt_path: Checkpoint of a run, or "last" for the newest one in lightning_logs.
        input: Text file with a prompt on each line, or .jsonl, .json, .csv, .tsv or .parquet file whose rows have a
            "prompt", "messages", "conversations", "instruction" and "input", or the fields of the run's own template; a
            reply at the end of a dialogue is not read.
        output: File to write, or "-" for standard output.
        base: Folder or hub id of the base, if it has moved since the training.
        template: Format of a prompt instead of that of the run; "{prompt}" leaves the prompts unchanged.
        output_key: Field for the completion; the score is in "score", or in "<output_key>_score" for another field,
            and so is the final answer in "answer".
        batch_size: Prompts completed at once.
        max_new_tokens: Length limit of a completion.
        temperature: Samples at this temperature, 1 as in training; 0 takes the most likely token each time.
        top_p: Draw from the smallest set of tokens with at least this mass.
        seed: Seed of the sampling.
        dequantize: Load a base that was quantised in training as it was before, as on a machine without a GPU.
        best_of: Completions that are sampled for each prompt, of which the best one is written.
        best_by: Which one that is: agreement (the final answer of most), logprob (the most likely), discriminator (its
            highest score) or reward (that of the run, as far as it needs no target); among equals the most likely.
    """
    if batch_size < 1:
        raise LoraGANError(f"batch_size must be at least 1, got {batch_size}")
    if not output_key.strip():
        raise LoraGANError("output_key is empty; it names the field for the completion, such as completion")
    best = BestOf(best_of, best_by)
    how = sampling_at(temperature, best, max_new_tokens=max_new_tokens, top_p=top_p)
    rows = _rows(Path(input))
    _check_keys(rows, [output_key])
    if output not in STDOUT:
        _check_writable(Path(output))
    saved = load_saved(ckpt_path, base, dequantize)
    check_way(saved, best)
    names = ["score"] * saved.scores + ["answer"] * (saved.final_answer is not None)
    keys = [output_key, *(name if output_key == "completion" else f"{output_key}_{name}" for name in names)]
    _check_keys(rows, keys)
    prompts = [_row_prompt(saved, row, template) for row in rows]
    _check_lengths(saved.backbone, rows, prompts, how)
    torch.manual_seed(seed)
    with _opened(output) as stream:
        for start in range(0, len(rows), batch_size):
            part = slice(start, start + batch_size)
            for row, made in zip(rows[part], _completed(saved, prompts[part], how, best), strict=True):
                named = dict(zip(keys, made, strict=True))
                stream.write(json.dumps({**row.values, **named}, ensure_ascii=False, default=str) + "\n")
    if output not in STDOUT:
        print(f"{len(rows)} completions written to {output}")


@contextmanager
def _opened(output: str) -> Iterator[TextIO]:
    """The output to write to; half of a character in a row is written as JSON does it, \\ud800."""
    escaped = "backslashreplace"
    if output in STDOUT:
        with open(1, "w", encoding="utf-8", errors=escaped, closefd=False) as stream:
            yield stream
    else:
        with atomic_file(Path(output)) as draft, draft.open("w", encoding="utf-8", errors=escaped) as stream:
            yield stream


def _completed(saved: Saved, prompts: Sequence[Tensor], how: Sampling, best: BestOf) -> list[tuple[Any, ...]]:
    """A completion to each prompt, then its score if the discriminator can give one, then its final answer or None."""
    with saved.backbone.generator():
        rollout = sample_best(saved, prompts, how, best)
    columns: list[Sequence[Any]] = [rollout.texts]
    if saved.scores:
        columns.append(saved.score(prompts, [[ids] for ids in rollout.completion_ids]).tolist())
    if saved.final_answer is not None:
        columns.append([saved.final_answer(text) for text in rollout.texts])
    return list(zip(*columns, strict=True))


def _rows(path: Path) -> list[Row]:
    """The rows of a file of prompts."""
    if not path.is_file():
        raise LoraGANError(f"no file {path}; give a text file with a prompt on each line, or a .jsonl file")
    if path.name.removesuffix(".gz").endswith(FORMATS):
        rows = list(read_rows(str(path)))
    else:
        lines = enumerate(read_lines(path), start=1)
        rows = [Row({"prompt": line}, f"{path}, line {number}") for number, line in lines if line.strip()]
    if not rows:
        raise LoraGANError(f"{path} contains no prompts; write one on each line")
    return rows


def _row_prompt(saved: Saved, row: Row, template: str | None) -> Tensor:
    """Token ids (P,) of the prompt of a row."""
    try:
        if template is None:
            values = {name: clean(value) if isinstance(value, str) else value for name, value in row.values.items()}
            return saved.prompt(saved.prompts.row(values) or saved.prompts.dialogue(_asked(row)))
        prompt = row.values.get("prompt")
        if not isinstance(prompt, str):
            raise LoraGANError('there is no text in "prompt" to put into the template; leave out --template')
        return saved.prompt(saved.question(prompt, template))
    except LoraGANError as error:
        raise error if row.where in str(error) else LoraGANError(f"{row.where}: {error}") from error


def _asked(row: Row) -> list[Message]:
    """The dialogue of a row up to the last question."""
    field = next((name for name in ("prompt", "messages", "conversations", "conversation") if name in row.values), None)
    if field is not None and isinstance(row.values[field], str):
        system = row.text("system", default="")
        return [Message("system", system)] * bool(system) + [Message("user", row.text(field))]
    if field is None and "instruction" in row.values:
        said = [row.text("instruction"), row.text("input", default="")]
        return [Message("user", "\n\n".join(filter(None, said)))]
    turns = dialogue(row, None, field) if field is not None else []
    while turns and turns[-1].role != "user":
        turns.pop()
    if not turns:
        raise LoraGANError(
            f'{row.where} has no "prompt"; each row looks like {{"prompt": "…"}} or '
            '{"messages": [{"role": "user", "content": "…"}]}'
        )
    return turns


def _check_keys(rows: Sequence[Row], keys: Sequence[str]) -> None:
    """Refuse to write over what the rows hold."""
    for key in keys:
        if taken := next((row.where for row in rows if key in row.values), None):
            raise LoraGANError(
                f"{taken} has a field {key!r}, which would be overwritten; choose a new name with --output_key"
            )


def _check_writable(output: Path) -> None:
    """Make the folder of the output, and check that a file can be written there."""
    try:
        check_file_writable(output)
    except OSError as error:
        raise LoraGANError(f"cannot write {output}: {error.strerror}; choose another file with --output") from error


def _check_lengths(backbone: Backbone, rows: Sequence[Row], prompts: Sequence[Tensor], how: Sampling) -> None:
    """Find prompts that leave no room for a completion before the first is generated."""
    room = backbone.context_length - how.max_new_tokens
    long = [(row.where, len(prompt)) for row, prompt in zip(rows, prompts, strict=True) if len(prompt) > room]
    if long:
        where, length = long[0]
        raise LoraGANError(
            f"{len(long)} prompts are too long: that of {where} has {length} tokens; with max_new_tokens "
            f"{how.max_new_tokens} that is more than the model's context of {backbone.context_length}: lower "
            "max_new_tokens or shorten the prompts"
        )
