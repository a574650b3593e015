"""Answers of the page: those of ``chat``, as they grow, with memory, and stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from lora_gan.data import Alpaca, InstructionDataModule
from lora_gan.data.files import clean
from lora_gan.errors import LoraGANError
from lora_gan.inference import load_saved
from lora_gan.module import LoraGANModule
from lora_gan.sampling import Sampling, sample
from lora_gan.types import Message
from lora_gan.ui.models import Asking, Models, Settings
from lora_gan.ui.talk import NEW_TOKENS, Talk, choose
from tests.conftest import randomise, tiny
from tests.helpers.settings import grouped
from tests.helpers.steps import trainer

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def made(bases: dict[str, str], folder: Path, chat: bool) -> Path:
    """The folder of a run whose adapters matter."""
    base = shutil.copytree(bases["gpt2"], folder / "base")
    if chat:
        (base / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    rows = folder / "rows.json"
    rows.write_text('[{"instruction": "Say hello.", "output": "Hello!"}]', encoding="utf-8")
    data = InstructionDataModule(Alpaca(str(rows)), tokenizer=str(base), validation=0, test=0, chat=chat)
    torch.manual_seed(4)
    module, runner = LoraGANModule(**grouped(tiny(str(base)))), trainer(1)
    runner.fit(module, datamodule=data)
    randomise(module.backbone)
    runner.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {}, "data": {}}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(bases, tmp_path_factory.mktemp("run"), chat=False)


@pytest.fixture(scope="module")
def models(folder: Path) -> Models:
    return Models({"mine": folder})


def greedy(folder: Path, text: str, role: str, tokens: int = 6) -> str:
    backbone = load_saved(str(folder / "checkpoints" / "last.ckpt")).backbone
    prompt = torch.tensor(backbone.tokenizer.encode(text))
    with backbone.generator() if role == "generator" else backbone.reference():
        return sample(backbone, [prompt], 1, Sampling(max_new_tokens=tokens, do_sample=False)).texts[0]


def asked(models: Models, talk: Talk, question: str, **settings: float) -> Talk:
    return list(models.answer(talk, question, Settings(**{"new_tokens": 6, **settings})))[-1]  # type: ignore[arg-type]


def test_both_models_answer_as_in_chat(models: Models, folder: Path) -> None:
    turn = asked(models, Talk("mine"), " hi ").turns[0]
    assert (turn.question, turn.prompt, turn.done) == ("hi", "hi", True)
    for role in ("generator", "base"):
        assert turn.answers[role].text == greedy(folder, "### Prompt:\nhi\n\n### Response:\n", role)
        assert turn.answers[role].score is not None
    again = asked(models, Talk("mine", (turn,)), "hi").turns[1]  # each question alone, as in training
    assert again.answers == turn.answers and again.prompt == "hi"
    assert not models.keeps("mine")


def test_the_conversation_goes_on_with_the_chosen_answer(bases: dict[str, str], tmp_path: Path) -> None:
    folder = made(bases, tmp_path, chat=True)
    models = Models({"mine": folder})
    first = asked(models, Talk("mine"), "one")
    texts = {role: clean(answer.text) for role, answer in first.turns[0].answers.items()}
    assert texts["generator"] != texts["base"]
    for role, talk in (("generator", first), ("base", choose(first, "base"))):
        turn = asked(models, talk, "two").turns[1]
        assert turn.prompt == [Message("user", "one"), Message("assistant", texts[role]), Message("user", "two")]
        before = f"<|user|>one\n<|assistant|>{texts[role]}\n<|user|>two\n<|assistant|>"
        assert {r: turn.answers[r].text for r in texts} == {r: greedy(folder, before, r) for r in texts}
    long = asked(models, first, "x" * 200)
    assert (long.turns[1].forgotten, long.turns[1].prompt) == (1, [Message("user", "x" * 200)])


def test_a_page_that_is_slow_gets_the_newest_view() -> None:
    asking = Asking()
    for view in (Talk("old"), Talk("new"), None):
        asking.views.put(view)
    assert list(asking.newest()) == [Talk("new")]


def test_answers_grow_and_stop(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every view: how many of them a page gets depends on the time."""
    monkeypatch.setattr(Asking, "newest", lambda asking: iter(asking.views.get, None))
    views = list(models.answer(Talk("mine"), "hi", Settings(1.0, new_tokens=120)))
    lengths = [len(view.turns[0].answers["generator"].text) for view in views if view.turns[0].answers]
    assert len(set(lengths)) > 2 and lengths == sorted(lengths)
    part = models.answer(Talk("mine"), "hi", Settings(1.0, new_tokens=200))
    stopped = next(view for view in part if view.turns[0].answers)
    part.close()
    assert not stopped.turns[0].done
    assert asked(models, stopped, "again").turns[0].question == "again"  # the thread is free, the rest forgotten


def test_the_best_of_n_is_the_discriminators(models: Models) -> None:
    torch.manual_seed(3)
    one = [asked(models, Talk("mine"), "hi", temperature=1.0).turns[0].answers for _ in range(3)]
    best = [asked(models, Talk("mine"), "hi", temperature=1.0, best_of=16).turns[0].answers for _ in range(3)]
    for role in ("generator", "base"):
        mean, higher = (sum(turn[role].score or 0 for turn in turns) / 3 for turns in (one, best))
        assert higher > mean
    with pytest.raises(LoraGANError, match="needs different completions"):
        asked(models, Talk("mine"), "hi", best_of=4)


def test_a_run_whose_discriminator_has_not_learned_has_no_scores(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = "the discriminator of this run has never been trained"
    monkeypatch.setitem(models.load("mine").__dict__, "_discriminator", never)
    assert asked(models, Talk("mine"), "hi").turns[0].answers["base"].score is None
    with pytest.raises(LoraGANError, match=f"No best of 2: {never}"):
        asked(models, Talk("mine"), "hi", temperature=1.0, best_of=2)


def test_what_is_out_of_bounds_is_refused(models: Models) -> None:
    for wrong in (
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"best_of": 0},
        {"best_of": 1000},
        {"new_tokens": 0},
        {"new_tokens": NEW_TOKENS + 1},
    ):
        with pytest.raises(LoraGANError, match=r"got -?\w"):
            asked(models, Talk("mine"), "hi", **wrong)
    with pytest.raises(
        LoraGANError, match=r"has 3\d\d tokens with the words around it; .* fit into the context of 256"
    ):
        asked(models, Talk("mine"), "x" * 300)
    with pytest.raises(LoraGANError, match=r"no run '\.\./other' here; choose one of mine"):
        models.load("../other")
    with pytest.raises(LoraGANError, match=r"no run None here"):
        asked(models, Talk(None), "hi")  # type: ignore[arg-type]
    assert asked(models, Talk("mine"), "hi").turns[0].done  # after all of that
