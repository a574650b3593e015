"""Final answers, by hand."""

from __future__ import annotations

import pytest

from lora_gan.errors import LoraGANError
from lora_gan.final_answer import AfterMarker, AfterThinking, Boxed, FinalAnswer, Pattern, find_answer


@pytest.mark.parametrize(
    ("find", "text", "answer", "work"),
    [
        (AfterMarker(), "3 + 4 = 7\n#### 7", "7", "3 + 4 = 7"),
        (AfterMarker(), "#### 5 is wrong\n#### 7 \n", "7", "#### 5 is wrong"),  # the last one
        (AfterMarker(), "3 + 4 = 7", None, "3 + 4 = 7"),
        (AfterMarker(), "3 + 4 = 7 #### ", None, "3 + 4 = 7"),
        (AfterMarker("so:"), "so: 7", "7", ""),
        (
            AfterMarker("The last digit is"),
            "1 plus 2 is 3. The last digit is 3.",
            "3",
            "1 plus 2 is 3.",
        ),  # no full stop
        (AfterMarker(), "#### 3.5", "3.5", ""),
        (AfterThinking(), "<think>three, four</think>\n\n7", "7", "<think>three, four"),
        (AfterThinking(), "<think>a</think> b </think> c", "b </think> c", "<think>a"),
        (AfterThinking(), "<think>three, four", None, "<think>three, four"),
        (AfterThinking("[end]"), "hm [end] 7", "7", "hm"),
        (Boxed(), r"so \boxed{7}.", "7", "so"),
        (Boxed(), r"\boxed{1} no, \boxed{\frac{1}{2}} it is", r"\frac{1}{2}", r"\boxed{1} no,"),
        (Boxed(), r"\boxed{1} and \boxed{\frac{1}{2}", "1", ""),  # the last one is cut off
        (Boxed(), r"\boxed{\{1, 2\}}", r"\{1, 2\}", ""),
        (Boxed(), r"\boxed {\}}", r"\}", ""),
        (Boxed(), r"\boxed{7", None, r"\boxed{7"),
        (Boxed(), r"\boxed{}", None, ""),
        (Boxed(), "7", None, "7"),
        (Pattern(r"answer is (\d+)"), "The answer is 5, no, the answer is 7.", "7", "The answer is 5, no, the"),
        (Pattern(r"answer is (\d+)"), "It is 7.", None, "It is 7."),
        (Pattern(r"answer:(.)?"), "an answer:", None, "an"),  # the group took no part
        (Pattern(r"(?s)<a>(.*)</a>"), "x<a>1\n2</a>", "1\n2", "x"),
    ],
)
def test_by_hand(find: FinalAnswer, text: str, answer: str | None, work: str) -> None:
    assert (find(text), find.work(text)) == (answer, work)


def test_without_a_setting_the_whole_completion_is_the_answer() -> None:
    assert [find_answer(text, None) for text in (" 7 ", "", " ")] == ["7", None, None]
    assert find_answer("#### 7", AfterMarker()) == "7"


def test_mistakes() -> None:
    with pytest.raises(LoraGANError, match=r"no regular expression: .*put a backslash before"):
        Pattern("(")
    with pytest.raises(LoraGANError, match="has no group; put parentheses"):
        Pattern(r"\d+")
    with pytest.raises(LoraGANError, match="marker must not be empty"):
        AfterMarker(" ")
    with pytest.raises(LoraGANError, match="end must not be empty"):
        AfterThinking("")
