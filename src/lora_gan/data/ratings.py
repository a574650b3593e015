"""Ratings: examples of rows that each rate one or two answers, put together by prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from lora_gan.types import Example, Negative

REJECTED = "rejected"  # kind of negative


def is_bad_answer(example: Example) -> bool:
    """Whether the example is a prompt of which nothing but bad answers is known."""
    return bool(example.negatives) and not (example.target or example.answers or example.tests)


def by_prompt(examples: Iterable[Example], dropped: Counter[str]) -> list[Example]:
    """The examples, of which those of a prompt are put together where one of its answers is bad or two are contested.

    Such a prompt gives an example for each answer that is rated good or was chosen, with all worse answers as
    negatives: those it was chosen over, and those that are rated bad, unless they were chosen over it. Opposite ratings
    of an answer or of a pair cancel each other one by one and are counted, as are bad answers to prompts that have no
    other.

    Args:
        examples: A choice has a target and negatives, a good answer a target alone, a bad one is a negative alone.
        dropped: Is counted up by the ratings that are left out.
    """
    found: dict[str, list[Example]] = {}
    examples = list(examples)
    for example in examples:
        found.setdefault(example.prompt, []).append(example)
    joined = {prompt: _joined(rated, dropped) for prompt, rated in found.items() if _is_contested(rated)}
    if not joined:
        return examples
    return [one for prompt, rated in found.items() for one in joined.get(prompt, rated)]


def _choices(rated: Iterable[Example]) -> Counter[tuple[str, str]]:
    """How often an answer was chosen over another, by both."""
    return Counter((one.target, worse.text) for one in rated if one.target for worse in one.negatives)


def _is_contested(rated: Sequence[Example]) -> bool:
    choices = _choices(rated) if len(rated) > 1 else {}
    return any(map(is_bad_answer, rated)) or any((b, a) in choices for a, b in choices)


def _joined(rated: Sequence[Example], dropped: Counter[str]) -> list[Example]:
    """The examples of one prompt."""
    good = Counter(one.target for one in rated if one.target and not one.negatives)
    bad = Counter(worse.text for one in rated if is_bad_answer(one) for worse in one.negatives)
    choices = _choices(rated)
    won = [(a, b) for (a, b), n in choices.items() if n > choices[b, a]]
    poor = [text for text, n in bad.items() if n > good[text]]
    wanted = {a for a, _ in won} | {text for text, n in good.items() if n > bad[text]}
    targets: dict[str, Example] = {}
    for one in rated:
        if one.target in wanted:
            targets.setdefault(one.target, one)
    result = [one for one in rated if not one.target and not is_bad_answer(one)]
    for target, example in targets.items():
        lost = [b for a, b in won if a == target]
        lost += [text for text in poor if target not in poor and text != target and (text, target) not in won]
        result.append(replace(example, negatives=tuple(Negative(text, REJECTED) for text in dict.fromkeys(lost))))
    cancelled = sum(min(n, choices[b, a]) for (a, b), n in choices.items())
    dropped["contradicting_ratings"] += cancelled + sum(2 * min(n, good[text]) for text, n in bad.items())
    dropped["bad_answer_without_a_good_one"] += 0 if targets else sum(bad[text] - good[text] for text in poor)
    return result
