"""OpenAssistant conversations (oasst1, oasst2): trees of messages with ranked replies (Köpf et al. 2023)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

from lora_gan.data.files import Row, clean, is_hub_id, read_rows
from lora_gan.data.source import OnBad, Source
from lora_gan.data.templates import PROMPT_TURN, RESPONSE_TURN, before_text, fill, mark, unmark
from lora_gan.errors import DataError, LoraGANError
from lora_gan.types import Example, Message, Negative

ROLES = {"prompter": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Post:
    """One message of a tree."""

    id: str
    parent: str | None
    tree: str
    role: str
    text: str
    lang: str
    reviewed: bool | None
    deleted: bool
    spam: float
    quality: float
    rank: int | None  # 0 is the best of its siblings
    where: str
    split: str


@dataclass
class Forest:
    """Messages by id, and ids of the replies to each message, both in file order."""

    posts: dict[str, Post] = field(default_factory=dict)
    replies: dict[str | None, list[str]] = field(default_factory=dict)

    def add(self, post: Post) -> None:
        if post.id in self.posts:
            raise DataError(f"{post.where}: the message_id {post.id!r} occurs twice; delete one of the two")
        self.posts[post.id] = post
        self.replies.setdefault(post.parent, []).append(post.id)

    def below(self, id: str | None) -> list[Post]:
        return [self.posts[reply] for reply in self.replies.get(id, [])]


class OASST(Source):
    """Dialogues from flat rows (the hub, or .messages.jsonl.gz) or nested trees (.trees.jsonl.gz).

    For each user message, the best-ranked reply is the target and the lower-ranked replies are negatives; the dialogue
    continues below the best reply. If a message is dropped, so is everything below it.
    """

    path: str

    def __init__(
        self,
        path: str = "OpenAssistant/oasst1",
        langs: list[str] | None = None,
        turns: Literal["first", "all"] = "all",
        max_turns: int | None = None,
        history: bool = True,
        all_paths: bool = False,
        unreviewed: bool = False,
        max_spam: float = 0.5,
        min_rank_gap: int = 1,
        user_turn: str = PROMPT_TURN,
        assistant_turn: str = RESPONSE_TURN,
        limit: int | None = None,
        on_bad_row: OnBad = "raise",
    ) -> None:
        """
        Args:
            path: Local file (json, jsonl, csv, tsv, parquet; also .gz) or id of a data set on the Hugging Face Hub.
            langs: Languages of the messages to use; by default [en].
            turns: "first" makes an example of the first user message of a dialogue only, "all" of each.
            max_turns: Last user turn of a dialogue that makes an example; by default no limit.
            history: Whether the prompt contains the earlier turns.
            all_paths: Continue below every reply, not only below the best.
            unreviewed: Also use messages without a review; rejected messages are always dropped.
            max_spam: Drop messages whose spam label, from 0 to 1, is at least this.
            min_rank_gap: Smallest distance in rank between the target and a negative.
            user_turn: Template of a user turn.
            assistant_turn: Template of an assistant turn; the prompt ends where its {text} begins.
            limit: Number of examples to use, from the first; by default all.
            on_bad_row: "raise" makes a row that cannot be read an error; "drop" drops and counts it.

        Raises:
            LoraGANError: max_turns, min_rank_gap or limit is below 1, or a template names an unknown field.
        """
        super().__init__(on_bad_row)
        for name, number in (("max_turns", max_turns), ("min_rank_gap", min_rank_gap), ("limit", limit)):
            if number is not None and number < 1:
                raise LoraGANError(
                    f"{name} must be at least 1, got {number}; set data.init_args.source.init_args.{name}"
                )
        fill(user_turn, text="")
        self.header = before_text(assistant_turn)
        self.path = path
        self.langs = ["en"] if langs is None else langs
        self.turns = turns
        self.max_turns = max_turns
        self.history = history
        self.all_paths = all_paths
        self.unreviewed = unreviewed
        self.max_spam = max_spam
        self.min_rank_gap = min_rank_gap
        self.user_turn = user_turn
        self.assistant_turn = assistant_turn
        self.limit = limit

    @property
    def turn_templates(self) -> Mapping[str, str]:
        return {"user": self.user_turn, "assistant": self.assistant_turn}

    def rows(self) -> Iterator[Example]:
        self.forget_counts()
        forest = self._filtered(self._forest())
        given = 0
        for post in forest.posts.values():
            if post.role == "prompter" and given != self.limit:
                for example in self._examples(forest, post):
                    given += 1
                    yield example

    def _forest(self) -> Forest:
        forest = Forest()
        for row in self._read():
            try:
                for post in list(_posts(row)):
                    forest.add(post)
                self.repaired.update(row.repaired)
            except DataError as error:
                self.bad(error)
        return forest

    def _read(self) -> Iterator[Row]:
        if not is_hub_id(self.path):
            yield from read_rows(self.path, bad=self.bad)
            return
        for split in ("train", "validation"):
            for row in read_rows(self.path, split, self.bad):
                yield Row(row.values, row.where, "validation" if split == "validation" else "")

    def _filtered(self, forest: Forest) -> Forest:
        """The messages that are used, in file order."""
        faults = {post.id: self._fault(post, forest.posts.get(post.parent or "")) for post in forest.posts.values()}
        self.dropped.update(reason for reason in faults.values() if reason)
        reached = _reached(forest, lambda post: not faults[post.id])
        on_trees = _reached(forest, lambda post: True)
        left = Forest()
        for post in forest.posts.values():
            if post.id not in on_trees:
                self.bad(DataError(f"{post.where}: the message {post.id!r} is its own ancestor; fix its parent_id"))
            elif post.id in reached:
                left.add(post)
            else:
                self.dropped["below_one_left_out"] += not faults[post.id]
        return left

    def _fault(self, post: Post, parent: Post | None) -> str:
        if post.parent is not None and parent is None:
            return "orphan"
        if post.deleted:
            return "deleted"
        if post.reviewed is False:
            return "rejected"
        if post.reviewed is None and not self.unreviewed:
            return "unreviewed"
        if post.lang not in self.langs:
            return "other_language"
        if post.spam >= self.max_spam:
            return "spam"
        if not post.text:
            return "empty"
        return (
            "" if post.role == ("assistant" if parent and parent.role == "prompter" else "prompter") else "wrong_role"
        )

    def _examples(self, forest: Forest, post: Post) -> Iterator[Example]:
        path = _path(forest, post)
        replies = sorted(forest.below(post.id), key=_from_best)
        if not all(self.all_paths or _is_best(forest, turn) for turn in path if turn.role == "assistant"):
            return
        turn = (len(path) + 1) // 2
        if turn > (1 if self.turns == "first" else self.max_turns or turn):
            self.dropped["later_turn"] += 1
        elif not replies:
            self.dropped["no_reply"] += 1
        else:
            yield self._example(path if self.history else path[-1:], replies)

    def _example(self, path: list[Post], replies: list[Post]) -> Example:
        best = replies[0]
        self.dropped["negative_same_as_target"] += any(post.text == best.text for post in replies[1:])
        turns = [self._turn(post, mark(post.text)) for post in path[:-1]]
        made = unmark("".join(turns) + self._turn(path[-1], mark(path[-1].text, cuttable=False)) + self.header)
        earlier = [Message(ROLES[post.role], post.text, ((0, len(post.text)),)) for post in path[:-1]]
        return Example(
            made.text,
            best.text,
            references=(best.text,),
            negatives=tuple(Negative(post.text, kind="lower_rank") for post in replies if self._is_lower(post, best)),
            group=best.tree,
            source=self.name,
            split=best.split,
            meta={"message": best.id},
            cuttable=made.cuttable,
            literal=made.literal,
            messages=(*earlier, Message("user", path[-1].text)),
        )

    def _turn(self, post: Post, text: str) -> str:
        return fill(self.user_turn if post.role == "prompter" else self.assistant_turn, text=text)

    def _is_lower(self, post: Post, best: Post) -> bool:
        if post.rank is None or best.rank is None or post.text == best.text:
            return False
        return post.rank - best.rank >= self.min_rank_gap


def _reached(forest: Forest, passes: Callable[[Post], bool]) -> set[str]:
    """Ids of the messages that pass together with all their ancestors, up to a root or an orphan."""
    reached: set[str] = set()
    queue = deque(post for post in forest.posts.values() if post.parent not in forest.posts)
    while queue:
        post = queue.popleft()
        if passes(post):
            reached.add(post.id)
            queue.extend(forest.below(post.id))
    return reached


def _from_best(post: Post) -> tuple[bool, int, float]:
    return post.rank is None, post.rank or 0, -post.quality


def _is_best(forest: Forest, reply: Post) -> bool:
    return min(forest.below(reply.parent), key=_from_best) is reply


def _path(forest: Forest, post: Post) -> list[Post]:
    """The messages from the root to ``post``."""
    path = [post]
    while path[-1].parent is not None:
        path.append(forest.posts[path[-1].parent])
    return path[::-1]


def _posts(row: Row) -> Iterator[Post]:
    """The message of a flat row, or all messages of a row with a tree."""
    root = row.values.get("prompt")
    if not isinstance(root, Mapping):
        yield _post(row, row.values.get("parent_id"), row.values.get("message_tree_id"))
        return
    queue: deque[tuple[Mapping[str, object], str | None]] = deque([(root, None)])
    while queue:
        node, parent = queue.popleft()
        post = _post(Row(node, row.where, row.split, row.repaired), parent, row.values.get("message_tree_id"))
        yield post
        replies = node.get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(reply, Mapping) for reply in replies):
            raise DataError(f"{row.where}: the replies of {post.id!r} are not a list of messages; fix the row")
        queue.extend((reply, post.id) for reply in replies)


def _post(row: Row, parent: object, tree: object) -> Post:
    id, role = row.text("message_id"), row.text("role")
    if role not in ROLES:
        raise DataError(f"{row.where}: the role {role!r} is neither prompter nor assistant; fix or delete the row")
    reviewed, deleted = row.values.get("review_result"), row.values.get("deleted") or False
    wrong = {
        "parent_id": not isinstance(parent, str | None),
        "message_tree_id": not (isinstance(tree, str) and tree),
        "review_result": not isinstance(reviewed, bool | None),
        "deleted": not isinstance(deleted, bool),
    }
    for name in (name for name, is_wrong in wrong.items() if is_wrong):
        raise DataError(
            f"{row.where}: the field {name!r} of the message {id!r} is empty or of the wrong type; fix the row"
        )
    return Post(
        id=id,
        parent=clean(str(parent)) if parent else None,
        tree=str(tree),
        role=role,
        text=row.text("text"),
        lang=row.text("lang", default=""),
        reviewed=reviewed if isinstance(reviewed, bool) else None,
        deleted=bool(deleted),
        spam=_label(row, "spam"),
        quality=_label(row, "quality"),
        rank=_rank(row),
        where=row.where,
        split=row.split,
    )


def _rank(row: Row) -> int | None:
    rank = row.values.get("rank")
    if rank is None or rank != rank:  # pandas writes NaN for a missing rank
        return None
    if not isinstance(rank, int | float) or not isfinite(rank) or rank != int(rank):
        raise DataError(f"{row.where}: the rank {rank!r} is not a whole number; fix or delete the row")
    return int(rank)


def _label(row: Row, name: str) -> float:
    """The value of a label in either format, two parallel lists or nested objects; 0 if it is missing."""
    names, values = row.get("labels", "name"), row.get("labels", "value")
    value = row.get("labels", name, "value")
    if isinstance(names, list) and isinstance(values, list) and name in names and len(names) == len(values):
        value = values[names.index(name)]
    return float(value) if isinstance(value, int | float) else 0.0
