"""Rows in one of today's usual formats, recognised by their fields."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_gan.data.dialogues import dialogue, is_dialogue, is_transcript
from lora_gan.data.files import Row, read_rows
from lora_gan.data.formats import ALPACA, FORMATS, RATED, STANDARD, WITHOUT_TARGET, Format, format_of
from lora_gan.data.ratings import REJECTED, by_prompt, is_bad_answer
from lora_gan.data.source import OnBad, RowSource, normal
from lora_gan.data.sources.alpaca import Alpaca
from lora_gan.data.templates import PROMPT_TURN, RESPONSE_TURN, before_text, fill, mark, unmark
from lora_gan.errors import DataError
from lora_gan.types import Example, Message, Negative

log = logging.getLogger("lora_gan")

SYSTEM_TURN = "### System:\n{text}\n\n"
OPTIONAL = {"answer", "input", "label", "system", "tests"}  # fields that are read where there are any
KNOWN = ("answer", "tests")  # those that say what a good reply is, without being one


class StandardFormat(RowSource):
    """Rows in one of today's usual formats, recognised by the fields of the first row.

    These are messages (role, content); conversations (ShareGPT: from, value); prompt and completion (or response);
    prompt, chosen and rejected; Alpaca's instruction, input and output; and prompt and answer or prompt and tests,
    without a target.
    Prompts and completions are texts or lists of messages; a message's content is a text or a list of parts of type
    text; a field system is the system message. A field answer is the final answer of the last reply, or a list of all
    that are accepted; a field tests holds the tests of the last reply's code, Python statements, or a list of them. A
    row that has one of the two and no completion is a prompt without target.
    Without a prompt, chosen and rejected may be whole dialogues as "\\n\\nHuman: …\\n\\nAssistant: …".
    The last reply of a dialogue is the target, all before it the prompt, and what is rejected a negative of kind
    "rejected"; a reply with the weight 0 is no target. Dialogues with the same system message and first question are
    one group.

    Completions with a label (true or false, as of KTO) are ratings, and may stand between rows of chosen and rejected.
    All ratings of a prompt are put together: see :func:`lora_gan.data.ratings.by_prompt`. In a stream, which is read
    row by row, a completion with the label false is left out.
    """

    def __init__(
        self,
        path: str | None = None,
        every_turn: bool = False,
        user_turn: str = PROMPT_TURN,
        assistant_turn: str = RESPONSE_TURN,
        system_turn: str = SYSTEM_TURN,
        hub_config: str | None = None,
        hub_split: str = "train",
        limit: int | None = None,
        on_bad_row: OnBad = "raise",
    ) -> None:
        """
        Args:
            path: Local file (json, jsonl, csv, tsv, parquet; also .gz) or id of a data set on the Hugging Face Hub; by
                default the path of the data module.
            every_turn: Make an example of each reply of a dialogue, not only of the last.
            user_turn: Template of a user turn, where the prompt is not written with a chat template.
            assistant_turn: Template of an assistant turn; the prompt ends where its {text} begins.
            system_turn: Template of a system message.
            hub_config: Configuration of a data set on the hub.
            hub_split: Split of a data set on the hub.
            limit: Number of examples to use, from the first; by default all.
            on_bad_row: "raise" makes a row that cannot be read an error; "drop" drops and counts it.

        Raises:
            LoraGANError: limit is below 1, or a template names an unknown field.
        """
        super().__init__(path or "", limit, on_bad_row)
        self.turns = {"user": user_turn, "assistant": assistant_turn, "system": system_turn}
        for template in self.turns.values():
            fill(template, text="")
        self.every_turn = every_turn
        self.hub_config = hub_config
        self.hub_split = hub_split
        self.format: Format | None = None
        self.alpaca = Alpaca(self.path)
        self.alpaca.dropped, self.alpaca.repaired = self.dropped, self.repaired

    @property
    def name(self) -> str:
        """The format, once a row has been read."""
        return self.format.name if self.format else super().name

    @property
    def prompt_templates(self) -> tuple[str, ...]:
        return self.alpaca.prompt_templates if self.format is ALPACA else super().prompt_templates

    @property
    def turn_templates(self) -> Mapping[str, str] | None:
        return None if self.format is ALPACA else self.turns

    def rows(self) -> Iterable[Example]:
        self.format = None
        return by_prompt(super().rows(), self.dropped)

    def read(self) -> Iterator[Row]:
        return read_rows(self.path, self.hub_split, self.bad, self.hub_config)

    def example(self, row: Row) -> Example | None:
        """The example of the row's last reply."""
        example = next(reversed(self.examples(row)), None)
        if example is None or not is_bad_answer(example):
            return example
        self.dropped["labelled_false"] += 1
        return None

    def examples(self, row: Row) -> Sequence[Example]:
        if self.format is None:
            self.format = self._recognised(row)
        if self.format in WITHOUT_TARGET:
            self.format = _with_reply(row, self.format)
        if self._has_no_target(row, self.format):
            return self._without_target(row)
        known = _rating(row, self.format)
        if missing := [field for field in known.fields if field not in row.values]:
            raise self._another_shape(row, missing[0])
        if self.format is ALPACA:
            example = self.alpaca.example(row)
            return [replace(example, answers=row.answers("answer"), tests=row.tests("tests"))] if example else []
        return self._of_dialogue(row, known)

    def _recognised(self, row: Row) -> Format:
        found, fields = format_of(row.values), ", ".join(map(str, row.values)) or "none"
        if found is None:
            known = "; ".join(
                ", ".join(known.fields) for known in (*FORMATS, *WITHOUT_TARGET) if known.source == STANDARD
            )
            raise DataError(
                f"{row.where}: the fields {fields} are no format that is recognised ({known}); rename them, or set "
                "data.init_args.source to lora_gan.data.OwnFile, whose template and target name the fields"
            )
        if found.source != STANDARD:
            raise DataError(
                f"{row.where}: {found.source} reads rows of {', '.join(found.fields)}; set data.init_args.source to it"
            )
        unread = ", ".join(name for name in row.values if name not in {*found.fields, *OPTIONAL})
        if unread:
            log.info("%s: rows of %s; other fields are not read: %s", row.where, ", ".join(found.fields), unread)
        return found

    def _another_shape(self, row: Row, missing: str) -> DataError:
        fields = ", ".join(map(str, row.values)) or "none"
        return DataError(
            f"{row.where}: the field {missing!r} is missing (fields found: {fields}), which the first row has; "
            "add or rename it, and give rows of another format in a file of their own"
        )

    def _has_no_target(self, row: Row, known: Format) -> bool:
        reply = "chosen" if "chosen" in known.fields else known.fields[-1]
        answered = any(row.values.get(field) is not None for field in KNOWN) and not row.values.get(reply)
        return known in WITHOUT_TARGET or ("prompt" in known.fields and answered)

    def _without_target(self, row: Row) -> list[Example]:
        """The prompt of a row that has a final answer or tests, and no reply."""
        turns, known = dialogue(row, "prompt", None), _known(row)
        asked = turns[-1].content if turns and turns[-1].role == "user" else ""
        if not asked or not any(known.values()):
            self.dropped["empty_answer" if asked else "empty_prompt"] += 1
            return []
        return [self._example(turns, "", [], known)]

    def _of_dialogue(self, row: Row, known: Format) -> list[Example]:
        """The examples of the replies that are targets."""
        prompt = "prompt" if "prompt" in known.fields else None
        reply = "chosen" if "chosen" in known.fields else known.fields[-1]
        turns = dialogue(row, prompt, reply)
        replies = [i for i in range(1, len(turns)) if (turns[i - 1].role, turns[i].role) == ("user", "assistant")]
        if not replies:
            self.dropped["no_reply"] += 1
        learned = [i for i in replies if turns[i].learned] or replies
        examples = []
        for i in replies if self.every_turn else learned[-1:]:
            fault = _fault(turns[i - 1], turns[i])
            if fault:
                self.dropped[fault] += 1
            elif row.values.get("label") is False:
                examples.append(self._example(turns[:i], "", [turns[i].content], {}))
            else:
                rejected = self._rejected(row, prompt, turns[:i]) if i == replies[-1] and reply == "chosen" else []
                known_of_it = _known(row) if i == replies[-1] else {}
                examples.append(self._example(turns[:i], turns[i].content, rejected, known_of_it))
        return examples

    def _rejected(self, row: Row, prompt: str | None, history: Sequence[Message]) -> list[str]:
        """The rejected replies to ``history``."""
        value = row.values["rejected"]
        if not is_dialogue(value) and (prompt or not is_transcript(value)):
            return row.texts("rejected")
        *before, last = dialogue(row, prompt, "rejected") or [Message("user", "")]
        if before == list(history) and last.role == "assistant":
            return [last.content]
        self.dropped["rejected_reply_to_another_prompt"] += 1
        return []

    def _example(
        self, history: Sequence[Message], target: str, rejected: Sequence[str], known: Mapping[str, tuple[str, ...]]
    ) -> Example:
        *earlier, asked = history
        written = [self._turn(turn, cuttable=turn.role != "system") for turn in earlier]
        made = unmark("".join(written) + self._turn(asked, cuttable=False) + before_text(self.turns["assistant"]))
        self.dropped["negative_same_as_target"] += target in rejected
        return Example(
            made.text,
            target,
            references=(target,) if target else (),
            negatives=tuple(Negative(text, REJECTED) for text in dict.fromkeys(rejected) if text not in ("", target)),
            group=_group(history),
            source=self.name,
            cuttable=made.cuttable,
            literal=made.literal,
            messages=(*map(_cuttable, earlier), asked),
            answers=known.get("answers", ()),
            tests=known.get("tests", ()),
        )

    def _turn(self, turn: Message, cuttable: bool) -> str:
        return fill(self.turns[turn.role], text=mark(turn.content, cuttable))


def _known(row: Row) -> dict[str, tuple[str, ...]]:
    """What a row says about good replies, as fields of an example."""
    return {"answers": row.answers("answer"), "tests": row.tests("tests")}


def _with_reply(row: Row, before: Format) -> Format:
    """The format of a row after rows without a target only: it may be the first with a reply."""
    found = format_of(row.values)
    return found if found is not None and found.fields[0] == "prompt" else before


def _rating(row: Row, before: Format) -> Format:
    """The format of a row after others of format ``before``: choices and labelled completions may be mixed."""
    found = format_of(row.values) if before in RATED else None
    labelled = isinstance(row.values.get("label"), bool)
    return found if found in RATED and (labelled or "chosen" in found.fields) else before


def _fault(asked: Message, reply: Message) -> str:
    if not reply.learned:
        return "weight_0"
    return "empty_prompt" if not asked.content else "" if reply.content else "empty_target"


def _group(history: Sequence[Message]) -> str:
    """The instruction and the first question."""
    first = next(i for i, turn in enumerate(history) if turn.role == "user" and turn.content)
    return "\n".join(normal(turn.content) for turn in history[: first + 1] if turn.role != "assistant")


def _cuttable(turn: Message) -> Message:
    """An earlier turn, which may be cut; the instruction may not."""
    spans = ((0, len(turn.content)),) if turn.content and turn.role != "system" else ()
    return Message(turn.role, turn.content, spans)


class Rows(StandardFormat):
    """Rows in memory, in one of the formats of :class:`StandardFormat`.

    Args:
        rows: A list of dictionaries, a ``datasets.Dataset`` or a ``pandas.DataFrame``.

    Raises:
        DataError: They are something else.
    """

    def __init__(self, rows: Any) -> None:
        super().__init__("rows in memory")
        if hasattr(rows, "iterrows"):  # of pandas, where a missing value is nan
            rows = rows.astype(object).where(rows.notna(), None).to_dict("records")
        if isinstance(rows, Mapping):
            raise DataError(
                f"got a {type(rows).__name__} of {', '.join(map(str, rows)) or 'nothing'}, not rows: give one split of "
                "several, and make rows of columns by datasets.Dataset.from_dict(columns)"
            )
        if isinstance(rows, str) or not isinstance(rows, Iterable):
            raise DataError(f"rows are a list of dictionaries, got {type(rows).__name__}")
        self.given: Iterable[Mapping[str, Any]] = rows

    def read(self) -> Iterator[Row]:
        for number, values in enumerate(self.given, start=1):
            if not isinstance(values, Mapping):
                raise DataError(
                    f"row {number} is {type(values).__name__}, not a dictionary such as "
                    '{"prompt": "…", "completion": "…"}'
                )
            yield Row(dict(values), f"row {number}")
