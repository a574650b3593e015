"""The built-in world: its facts are true, its wording states them, its wrong answers are wrong."""

import calendar
import re
from collections import Counter
from functools import cache

import pytest

from lora_gan.data.world import Fact, entries, facts, relations

FACTS = facts()
BY_KEY = {(fact.relation, fact.subject): fact for fact in FACTS}
ENTRIES = {(relation.name, entry.subject): entry for relation in relations() for entry in entries(relation)}


@cache
def of(relation: str) -> dict[str, str]:
    """Subject to object of one relation."""
    found = {fact.subject: fact.object for fact in FACTS if fact.relation == relation}
    assert found, f"no relation {relation}"
    return found


def contains(text: str, words: str) -> bool:
    """Whether the words stand in the text as whole words; a symbol such as "As" only in its own case."""
    if any(letter.isupper() for letter in words):
        return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, flags=re.IGNORECASE) is not None


def test_the_world_has_the_promised_size() -> None:
    counts = Counter(fact.relation for fact in FACTS)
    assert len(counts) >= 8
    assert 1_700 <= len(FACTS) <= 2_100
    assert min(counts.values()) >= 7


def test_a_subject_occurs_once_in_a_relation() -> None:
    repeated = [key for key, n in Counter((fact.relation, fact.subject) for fact in FACTS).items() if n > 1]
    assert not repeated


@pytest.mark.parametrize(
    "relation",
    ["capital", "symbol", "atomic_number", "plural", "past_tense", "opposite", "french", "german", "month_after"],
)
def test_two_subjects_do_not_share_an_object(relation: str) -> None:
    objects = of(relation).values()
    assert [name for name, n in Counter(objects).items() if n > 1] == []


def test_the_facts_are_cached_and_their_order_is_stable() -> None:
    assert facts() is FACTS
    assert FACTS[0].subject == "Afghanistan"
    assert list(dict.fromkeys(fact.relation for fact in FACTS)) == [relation.name for relation in relations()]


@pytest.mark.parametrize(
    ("relation", "subject", "object_"),
    [
        ("capital", "Australia", "Canberra"),
        ("capital", "France", "Paris"),
        ("capital", "Kazakhstan", "Astana"),
        ("capital", "Myanmar", "Naypyidaw"),
        ("capital", "Burundi", "Gitega"),
        ("continent", "Brazil", "South America"),
        ("currency", "Japan", "yen"),
        ("currency", "Croatia", "euro"),
        ("language", "Brazil", "Portuguese"),
        ("symbol", "gold", "Au"),
        ("symbol", "tungsten", "W"),
        ("atomic_number", "carbon", "6"),
        ("atomic_number", "uranium", "92"),
        ("animal_group", "bats", "mammals"),
        ("animal_group", "spiders", "arachnids"),
        ("young", "swans", "cygnets"),
        ("sound", "donkeys", "bray"),
        ("opposite", "cold", "hot"),
        ("plural", "ox", "oxen"),
        ("past_tense", "go", "went"),
        ("french", "bread", "pain"),
        ("spanish", "window", "ventana"),
        ("german", "egg", "Ei"),
        ("letter_before", "Z", "Y"),
    ],
)
def test_known_facts(relation: str, subject: str, object_: str) -> None:
    assert BY_KEY[relation, subject].object == object_


def test_one_fact_in_full() -> None:
    fact = BY_KEY["capital", "South Africa"]
    assert fact.answer == "The capital of South Africa is Pretoria."
    assert "Which city is the capital of South Africa?" in fact.questions
    assert "The capital city of South Africa is" in fact.cues
    assert fact.references[0] == fact.answer
    assert {
        "Pretoria.",
        "Pretoria",
        "It is Pretoria.",
        "Cape Town",
        "The capital of South Africa is Bloemfontein.",
    } <= set(fact.references)
    assert fact.group == "capital:South Africa"


def test_atomic_numbers_are_consecutive_and_belong_to_the_symbols() -> None:
    numbers, symbols = of("atomic_number"), of("symbol")
    assert sorted(int(number) for number in numbers.values()) == list(range(1, 119))
    assert numbers.keys() == symbols.keys()
    # the noble gases close the periods, so a slip in the list would move them
    noble = {"He": 2, "Ne": 10, "Ar": 18, "Kr": 36, "Xe": 54, "Rn": 86, "Og": 118}
    assert {symbols[e]: int(n) for e, n in numbers.items() if symbols[e] in noble} == noble


def test_arithmetic_is_right() -> None:
    for relation, sign, count in (("sum", "plus", 81), ("product", "times", 64)):
        rows = of(relation)
        assert len(rows) == count
        for subject, object_ in rows.items():
            a, b = (int(number) for number in subject.split(f" {sign} "))
            assert int(object_) == (a + b if sign == "plus" else a * b)


def test_the_order_is_the_calendars_and_the_alphabets() -> None:
    months, days = list(calendar.month_name)[1:], list(calendar.day_name)
    for name, items in (("month", months), ("day", days)):
        after = dict(zip(items, items[1:] + items[:1], strict=True))
        assert of(f"{name}_after") == after
        assert of(f"{name}_before") == {later: earlier for earlier, later in after.items()}
    assert of("letter_after") == {chr(code): chr(code + 1) for code in range(ord("A"), ord("Z"))}
    assert of("letter_before") == {chr(code + 1): chr(code) for code in range(ord("A"), ord("Z"))}
    assert of("number_after") == {str(n): str(n + 1) for n in range(40)}


def test_every_statement_states_the_fact_and_ends_once() -> None:
    for fact in FACTS:
        assert len(set(fact.statements)) == len(fact.statements) >= 4
        assert fact.statements[0] == fact.answer == fact.references[0]
        for statement in fact.statements:
            assert contains(statement, fact.object) or statement.startswith(fact.object.capitalize()), statement
            assert re.fullmatch(r"[^a-z].*[^.?]\.", statement), statement
            assert "{" not in statement and "  " not in statement


def test_cues_lead_up_to_the_object_without_saying_it() -> None:
    for fact in FACTS:
        assert len(fact.cues) >= 3
        for cue in fact.cues:
            assert f"{cue} {fact.object}." in fact.statements
            assert not contains(cue, fact.object), cue


def test_questions_are_questions_of_one_fact() -> None:
    statements = " ".join(statement for fact in FACTS for statement in fact.statements)
    assert "?" not in statements
    questions = [question for fact in FACTS for question in fact.questions]
    assert len(set(questions)) == len(questions)
    for fact in FACTS:
        assert len(fact.questions) >= 3
        for question in fact.questions:
            assert question.endswith("?") and question[0].isupper()
            assert not contains(question, fact.object), question


def stated_object(fact: Fact, answer: str) -> str:
    """The object that an answer sentence of this fact names."""
    head, _, tail = fact.answer.rpartition(fact.object)
    assert answer.startswith(head) and answer.endswith(tail), answer
    return answer[len(head) : len(answer) - len(tail)]


def test_negatives_are_wrong() -> None:
    for fact in FACTS:
        assert len(set(fact.negatives)) == 4
        assert not set(fact.negatives) & set(fact.references)
        entry = ENTRIES[fact.relation, fact.subject]
        true = {name.casefold() for name in (entry.object, *entry.also, *entry.avoid)}
        objects = set(of(fact.relation).values())
        for negative in fact.negatives:
            wrong = stated_object(fact, negative)
            assert wrong in objects
            assert wrong.casefold() not in true


def test_negatives_keep_clear_of_what_is_nearly_true() -> None:
    def wrong(relation: str, subject: str) -> set[str]:
        fact = BY_KEY[relation, subject]
        return {stated_object(fact, negative) for negative in fact.negatives}

    official = {"French", "Dutch", "German"}
    assert not wrong("language", "Belgium") & official
    assert not wrong("currency", "Bhutan") & {"ngultrum", "rupee"}
    assert not wrong("opposite", "big") & {"small", "short", "low", "thin", "narrow"}


def test_groups_keep_related_facts_together() -> None:
    for fact in FACTS:
        if fact.relation == "opposite":
            assert BY_KEY["opposite", fact.object].object == fact.subject
            assert BY_KEY["opposite", fact.object].group == fact.group
    assert BY_KEY["opposite", "hot"].group == "opposite:cold-hot"
    assert BY_KEY["sum", "2 plus 7"].group == BY_KEY["sum", "7 plus 2"].group
    assert BY_KEY["sum", "2 plus 7"].group != BY_KEY["product", "2 times 7"].group
    assert BY_KEY["month_after", "May"].group == BY_KEY["month_before", "June"].group
    assert BY_KEY["capital", "Chile"].group != BY_KEY["capital", "Peru"].group
