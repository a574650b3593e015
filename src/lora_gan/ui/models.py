"""Models of the page: the runs that were named, and their answers, token by token."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from lora_gan.backbone import GENERATOR
from lora_gan.best_of import BestOf
from lora_gan.checkpointing.files import LAST, intact_checkpoint
from lora_gan.data.files import clean
from lora_gan.errors import LoraGANError
from lora_gan.inference import Saved, load_saved, prompt_after, sample_best, sampling_at
from lora_gan.sampling import Sampling
from lora_gan.types import Message
from lora_gan.ui.talk import BASE, BEST_OF, NEW_TOKENS, Answer, Talk, Turn, check_question

PAUSE = 0.05  # seconds between two views of an answer that grows
PATIENCE = 1.0  # seconds until a view is shown again


@dataclass(frozen=True)
class Settings:
    """How answers are sampled.

    Args:
        temperature: 0 takes the most likely token each time.
        best_of: Answers that are sampled, of which the discriminator's best is shown.
        new_tokens: Length limit of an answer.
    """

    temperature: float = 0.0
    best_of: int = 1
    new_tokens: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 10:
            raise LoraGANError(f"The temperature must be from 0 to 10, got {self.temperature}.")
        if not 1 <= self.best_of <= BEST_OF:
            raise LoraGANError(f"The best of 1 to {BEST_OF} answers can be taken, got {self.best_of}.")
        if not 1 <= self.new_tokens <= NEW_TOKENS:
            raise LoraGANError(f"An answer may have 1 to {NEW_TOKENS} tokens, got {self.new_tokens}.")


class Stopped(Exception):
    """Nobody waits for the answer any more."""


class Asking:
    """A question that is being answered: views of the conversation as the answers grow, until it is stopped."""

    def __init__(self) -> None:
        self.views: queue.SimpleQueue[Talk | None] = queue.SimpleQueue()  # None ends them
        self.over = threading.Event()  # nothing of it will be shown any more
        self._stop = threading.Event()

    @property
    def stopped(self) -> bool:
        """Whether nobody waits for the answers any more."""
        return self._stop.is_set()

    def stop(self) -> None:
        """End the views, and with the next token the models."""
        self._stop.set()
        self.views.put(None)

    def newest(self) -> Iterator[Talk]:
        """Views, the last of each pause; now and then the same again, so that the iterator can be closed."""
        going, last = True, None
        while going:
            found = self._found()
            going = None not in found
            last = next((view for view in reversed(found) if view is not None), last)
            if last is not None:
                yield last
                self._stop.wait(PAUSE * going)

    def _found(self) -> list[Talk | None]:
        try:
            found = [self.views.get(timeout=PATIENCE)]
        except queue.Empty:
            return []
        while not self.views.empty():
            found.append(self.views.get())
        return found


class Models:
    """The models of runs. All that they compute is computed in one thread, one request after the other."""

    def __init__(
        self,
        folders: Mapping[str, Path],
        template: str | None = None,
        base: str | None = None,
        dequantize: bool = False,
    ) -> None:
        """
        Args:
            folders: Folders of the runs, by name.
            template: As that of ``chat``.
            base: Where the base of the runs is now, if it has moved.
            dequantize: Load a base that was quantised in training as it was before.
        """
        self.folders, self.template = dict(folders), template
        self._base, self._dequantize = base, dequantize
        self._loaded: dict[str, Saved] = {}
        self._thread = ThreadPoolExecutor(1, "models")
        self._closed = threading.Event()

    def close(self) -> None:
        """Stop what is being computed, so that the program can end."""
        self._closed.set()
        self._thread.shutdown(cancel_futures=True)

    def load(self, run: str) -> Saved:
        """The best checkpoint of a run, else its last one, read once.

        Raises:
            LoraGANError: The run is none of those named, or it cannot be loaded.
        """
        return self._thread.submit(self._saved, run).result()

    def keeps(self, run: str) -> bool:
        """Whether a conversation goes on from question to question."""
        return self.template is None and self.load(run).prompts.keeps_dialogue

    def _saved(self, run: str) -> Saved:
        if run not in self.folders:
            raise LoraGANError(f"There is no run {run!r} here; choose one of {', '.join(self.folders)}.")
        if run not in self._loaded:
            path = checkpoint_of(self.folders[run])
            self._loaded[run] = load_saved(str(path), self._base, self._dequantize)
        return self._loaded[run]

    def answer(self, talk: Talk, question: str, settings: Settings, asking: Asking | None = None) -> Iterator[Talk]:
        """The conversation with a question and, growing, the answers to it; closing the iterator stops the models.

        Args:
            talk: The conversation before.
            question: As it was typed.
            settings: How answers are sampled.
            asking: Stops the models from elsewhere.

        Raises:
            LoraGANError: The question is empty or too long, or the settings do not fit the run.
        """
        asked = check_question(talk, question)
        best = BestOf(settings.best_of, "discriminator")
        how = sampling_at(settings.temperature, best, settings.new_tokens)
        asking = asking or Asking()

        def compute() -> None:
            try:
                self._compute(talk.finished, asked, how, best, asking)
            except Stopped:
                pass
            finally:
                asking.views.put(None)

        yield replace(talk.finished, turns=(*talk.finished.turns, Turn(asked, asked)))
        done = self._thread.submit(compute)
        try:
            yield from asking.newest()
            if not asking.stopped:
                done.result()
        finally:
            asking.stop()

    def _compute(
        self,
        talk: Talk,
        question: str,
        how: Sampling,
        best: BestOf,
        asking: Asking,
    ) -> None:
        self.check_wanted(asking)
        saved = self._saved(talk.run)
        if best.n > 1 and not saved.scores:
            raise LoraGANError(f"No best of {best.n}: {saved.no_scores}.")
        prompt, turn = self._asked(saved, talk, question, how)
        talk = replace(talk, turns=(*talk.turns, turn))
        asking.views.put(talk)
        for role, mode in modes(saved).items():
            with mode():
                rollout = sample_best(saved, [prompt], how, best, Growing(self, saved, talk, role, asking).put)
            text = rollout.texts[0]
            score = saved.score([prompt], [[rollout.completion_ids[0]]]).item() if saved.scores else None
            talk = talk.with_answer(role, Answer(text, True, saved.answer_after_work(text), score))
            asking.views.put(talk)

    def check_wanted(self, asking: Asking) -> None:
        """Raise :class:`Stopped` where nobody waits for the answer any more."""
        if asking.stopped or self._closed.is_set():
            raise Stopped

    def _asked(self, saved: Saved, talk: Talk, question: str, how: Sampling) -> tuple[Tensor, Turn]:
        """The prompt (P,) of a question, and its turn."""
        asked = saved.question(question, self.template)
        keeps = self.template is None and saved.prompts.keeps_dialogue
        turns = list(messages(talk)) if keeps else []
        prompt, forgotten = prompt_after(saved, turns, asked, how.max_new_tokens)
        room = saved.backbone.context_length - how.max_new_tokens
        if len(prompt) > room:
            raise LoraGANError(
                f"The question has {len(prompt)} tokens with the words around it; with an answer of "
                f"{how.max_new_tokens} tokens, {max(room, 0)} fit into the context of {saved.backbone.context_length}. "
                "Shorten the question, or lower the longest answer in the settings."
            )
        read = [*turns[forgotten:], *asked.messages[-1:]] if keeps else question
        return prompt, Turn(question, read, forgotten // 2)


def checkpoint_of(folder: Path) -> Path:
    """A run's best checkpoint, else its last one; where that is damaged, the newest that is not.

    Raises:
        LoraGANError: None is intact.
    """
    best = sorted(folder.glob("checkpoints/best-*.ckpt"), key=lambda path: path.stat().st_mtime)
    return intact_checkpoint(best[-1] if best else folder / "checkpoints" / LAST)


def messages(talk: Talk) -> Iterator[Message]:
    """The earlier turns, as the models read them."""
    for turn in talk.finished.turns:
        last = turn.prompt if isinstance(turn.prompt, str) else turn.prompt[-1].content
        yield Message("user", last)
        yield Message("assistant", clean(turn.answers[turn.kept].text))


def modes(saved: Saved) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    """Contexts in which each of the two answers."""
    return {GENERATOR: saved.backbone.generator, BASE: saved.backbone.reference}


@dataclass
class Growing:
    """An answer that grows by tokens; its last character shows once it is complete."""

    models: Models
    saved: Saved
    talk: Talk
    role: str
    asking: Asking
    ids: list[int] = field(default_factory=list)

    def put(self, tokens: Tensor) -> None:
        """Take the next token of one answer, or of each of several, of which none shows yet.

        Raises:
            Stopped: Nobody waits for it any more.
        """
        self.models.check_wanted(self.asking)
        if len(tokens) == 1:
            self.ids += tokens.tolist()
            text = self.saved.backbone.tokenizer.decode(self.ids, skip_special_tokens=True)
            self.asking.views.put(self.talk.with_answer(self.role, Answer(text.rstrip("\ufffd"))))
