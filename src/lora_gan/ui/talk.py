"""Talk: a conversation with the generator and the base of a run, both of which answer each question.

There is one conversation: both models read the same earlier turns, each with one answer, so that two answers differ
by the model alone, and a choice between them is a preference for one prompt. The answer that a person chose goes on;
without a choice it is the generator's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lora_gan.backbone import GENERATOR
from lora_gan.data.files import clean
from lora_gan.errors import LoraGANError
from lora_gan.ui.ratings import Prompt

BASE = "base"
ROLES = (GENERATOR, BASE)
CHARACTERS = 8000  # of a question
TURNS = 50  # of a conversation
NEW_TOKENS = 1024  # of an answer
BEST_OF = 32  # answers of which one is shown


@dataclass(frozen=True)
class Answer:
    """What a model has said so far."""

    text: str = ""
    done: bool = False
    final: str | None = None  # the final answer, where work stands before it
    score: float | None = None  # by the discriminator


@dataclass(frozen=True)
class Turn:
    """A question and its answers."""

    question: str
    prompt: Prompt  # what was answered, as a rating holds it
    forgotten: int = 0  # earlier turns that no longer fit into the context
    answers: Mapping[str, Answer] = field(default_factory=dict)  # by role
    kept: str = GENERATOR  # whose answer the conversation goes on with
    chosen: str | None = None  # whose answer was chosen as the better one
    labels: Mapping[str, bool] = field(default_factory=dict)  # by role

    @property
    def done(self) -> bool:
        """Whether all answers are complete."""
        return all(role in self.answers and self.answers[role].done for role in ROLES)


@dataclass(frozen=True)
class Talk:
    """A conversation with the models of a run, which is named."""

    run: str
    turns: tuple[Turn, ...] = ()

    @property
    def last(self) -> Turn | None:
        """The turn that can be rated."""
        return self.turns[-1] if self.turns and self.turns[-1].done else None

    @property
    def finished(self) -> Talk:
        """Without a last turn that was stopped before both had answered."""
        return replace(self, turns=tuple(turn for turn in self.turns if turn.done))

    def with_answer(self, role: str, answer: Answer) -> Talk:
        """The conversation with what a model has said so far to the last question."""
        turn = self.turns[-1]
        return self.with_last(replace(turn, answers={**turn.answers, role: answer}))

    def with_last(self, turn: Turn) -> Talk:
        """The conversation with another last turn."""
        return replace(self, turns=(*self.turns[:-1], turn))


def choose(talk: Talk, role: str) -> Talk:
    """The conversation after the answer of ``role`` was chosen.

    Raises:
        LoraGANError: There are no two complete answers, they are equal, or one was chosen already.
    """
    turn = _rateable(talk)
    if turn.chosen is not None:
        raise LoraGANError("A choice between these two answers is saved already.")
    if len({answer.text for answer in turn.answers.values()}) == 1:
        raise LoraGANError("The two answers are the same, so none is better; rate one of them as good or bad.")
    return talk.with_last(replace(turn, chosen=role, kept=role))


def label(talk: Talk, role: str, good: bool) -> Talk:
    """The conversation after the answer of ``role`` was rated.

    Raises:
        LoraGANError: There are no complete answers, or this one was rated already.
    """
    turn = _rateable(talk)
    if role in turn.labels:
        raise LoraGANError("A rating of this answer is saved already.")
    return talk.with_last(replace(turn, labels={**turn.labels, role: good}))


def _rateable(talk: Talk) -> Turn:
    if talk.last is None:
        raise LoraGANError("There is nothing to rate yet: ask something, and wait until both have answered.")
    return talk.last


def check_question(talk: Talk, question: str) -> str:
    """The question without outer white space and signs that no tokenizer reads.

    Raises:
        LoraGANError: It is empty or too long, or the conversation is.
    """
    asked = clean(question)
    if not asked:
        raise LoraGANError("The question is empty.")
    if len(asked) > CHARACTERS:
        raise LoraGANError(f"The question has {len(asked)} characters; at most {CHARACTERS} are read. Shorten it.")
    if len(talk.finished.turns) >= TURNS:
        raise LoraGANError(f"The conversation has {TURNS} turns, which is the limit. Start a new one.")
    return asked
