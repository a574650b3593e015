"""What a run leaves behind is used: asked at the prompt, for a file, and given to others."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lora_gan.cli import main
from lora_gan.data import TWON, Alpaca, InstructionDataModule
from lora_gan.discriminator import AdapterDiscriminator, CompletionAndTarget
from lora_gan.export import export
from lora_gan.inference import _Printer, load_backbone, load_saved, score_of
from lora_gan.sampling import Sampling, sample
from lora_gan.types import PromptBatch
from tests.conftest import randomise
from tests.helpers.steps import Build, fit

IDS = torch.tensor([[72, 101, 108, 108, 111]])
Make = Callable[..., str]


@pytest.fixture
def run(build: Build, batch: PromptBatch, tmp_path: Path) -> Make:
    """A checkpoint in a run's folder."""

    def make(architecture: str = "gpt2", **settings: Any) -> str:
        module = build(architecture, **settings)
        randomise(module.backbone)
        path = tmp_path / "run" / "checkpoints" / "last.ckpt"
        fit(module, [batch], 1)[1].save_checkpoint(path)
        config = {
            "model": {"init_args": {"sampling": {"max_new_tokens": 7, "temperature": 0.5, "no_such": 1}}},
            "data": {"init_args": {"source": {"class_path": "lora_gan.data.Alpaca"}, "path": "yahma/alpaca-cleaned"}},
        }
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        (tmp_path / "run" / "held_out.md").write_text("| metric | base | trained |\n", encoding="utf-8")
        return str(path)

    return make


# chat


def ask(monkeypatch: pytest.MonkeyPatch, *questions: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{q}\n" for q in questions)))


def greedy(ckpt_path: str, text: str, role: str = "generator") -> tuple[str, float]:
    """The greedy completion by the sampler, and its score."""
    backbone = load_backbone(ckpt_path)
    prompt = torch.tensor(backbone.tokenizer.encode(text))
    with backbone.generator() if role == "generator" else backbone.reference():
        rollout = sample(backbone, [prompt], 1, Sampling(max_new_tokens=5, do_sample=False))
    return rollout.texts[0], score_of(backbone, prompt, rollout.completion_ids[0])


def test_chat_compares_with_the_base(
    run: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run()
    ask(monkeypatch, "hi", "", "not asked")
    main(["chat", f"--ckpt_path={path}", "--max_new_tokens=5", "--compare=true", "--template={prompt}"])
    printed = capsys.readouterr().out
    for role, name in (("reference", "base"), ("generator", "generator")):
        completion, score = greedy(path, "hi", role)
        assert f"{name:<11}{completion}   (discriminator {score:.2f})\n" in printed
    assert printed.count("(discriminator") == 2


def test_chat_without_a_judge_that_can_be_asked(
    run: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run(model=AdapterDiscriminator(CompletionAndTarget()))
    ask(monkeypatch, "hi")
    main(["chat", f"--ckpt_path={path}", "--max_new_tokens=5"])
    printed = capsys.readouterr().out
    assert (
        "no scores: the discriminator of this run is a AdapterDiscriminator that reads CompletionAndTarget" in printed
    )
    assert "(discriminator" not in printed


def test_tokens_are_shown_as_they_come(run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """A character of two bytes, so of two tokens here, waits for its second."""
    tokenizer = load_backbone(run()).tokenizer
    printer = _Printer(tokenizer)
    printer.put(torch.tensor([[1, 2, 3]]))
    seen = []
    for token in tokenizer.encode("aöb"):
        printer.put(torch.tensor([token]))
        seen.append(capsys.readouterr().out)
    printer.end()
    assert seen == ["a", "", "ö", "b"] and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--template=x"], "does not contain {prompt}; write {prompt}"),
        (["--max_new_tokens=999"], "more than the model's context of 256"),
        (["--temperature=0"], "for greedy decoding set do_sample: false"),
    ],
)
def test_mistakes_in_chat(
    more: list[str], message: str, run: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run()
    ask(monkeypatch, "hi")
    with pytest.raises(SystemExit):
        main(["chat", f"--ckpt_path={path}", *more])
    assert message in capsys.readouterr().err


# the chat template of a run

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QUESTION = "Say hello to all."


@pytest.mark.parametrize(
    ("source", "system", "text"),
    [
        (Alpaca, None, "<|user|>Say hello to all.\n<|assistant|>"),
        (Alpaca, "Be brief.", "<|system|>Be brief.\n<|user|>Say hello to all.\n<|assistant|>"),
        (partial(TWON, instruction="Reply."), None, "<|system|>Reply.\n<|user|>Say hello to all.\n<|assistant|>"),
    ],
)
def test_a_run_with_a_chat_template_is_asked_by_it(
    source: Any,
    system: str | None,
    text: str,
    run: Make,
    bases: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As the data module writes a row with the question, so do chat and generate."""
    base = shutil.copytree(bases["gpt2"], tmp_path / "chat")
    (base / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    rows = [{"instruction": QUESTION, "output": "Hello!", "post": QUESTION, "reply": "Hello, you!"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    read = source(str(tmp_path / "rows.json"))
    data = InstructionDataModule(read, tokenizer=str(base), chat=True, system=system, validation=0, test=0)
    data.setup()
    path = run(base=str(base))
    given = {"instruction": read.instruction} if isinstance(read, TWON) else {}
    settings = {"chat": True, "system": system, "source": {"class_path": "…", "init_args": given}}
    config = yaml.safe_dump({"data": {"init_args": settings}})
    (tmp_path / "run" / "config.yaml").write_text(config, encoding="utf-8")

    saved = load_saved(path)
    prompt = saved.prompt(QUESTION).tolist()
    assert prompt == list(data.splits["train"].items[0].prompt_ids) and saved.backbone.tokenizer.decode(prompt) == text
    completion, _ = greedy(path, text)
    ask(monkeypatch, QUESTION)
    main(["chat", f"--ckpt_path={path}", "--max_new_tokens=5"])
    assert f"{completion}   (discriminator" in capsys.readouterr().out
    (tmp_path / "in.txt").write_text(QUESTION, encoding="utf-8")
    out = tmp_path / "out.jsonl"
    main(["generate", f"--ckpt_path={path}", f"--input={tmp_path / 'in.txt'}", f"--output={out}", "--max_new_tokens=5"])
    assert json.loads(out.read_text(encoding="utf-8"))["completion"] == completion
    assert saved.backbone.tokenizer.decode(saved.prompt(QUESTION, "<{prompt}>")) == f"<{QUESTION}>"


# generate


def test_a_file_of_prompts_is_answered(run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In batches of two: the completions are those that each prompt gets alone."""
    path, prompts = run(), ["one", "two and more", "3"]
    (tmp_path / "in.jsonl").write_text(
        "\n".join(json.dumps({"prompt": p, "id": n}) for n, p in enumerate(prompts)), encoding="utf-8"
    )
    (tmp_path / "in.txt").write_text("one\n\ntwo and more\n3\n", encoding="utf-8")
    wanted = [greedy(path, f"<{prompt}>") for prompt in prompts]
    for name in ("in.jsonl", "in.txt"):
        out = tmp_path / "out.jsonl"
        more = [f"--input={tmp_path / name}", f"--output={out}", "--template=<{prompt}>"]
        main(["generate", f"--ckpt_path={path}", *more, "--batch_size=2", "--max_new_tokens=5"])
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        assert [row["prompt"] for row in rows] == prompts
        assert [row["completion"] for row in rows] == [completion for completion, _ in wanted]
        assert [row["score"] for row in rows] == pytest.approx([score for _, score in wanted], abs=1e-5)
        assert [row.get("id") for row in rows] == ([0, 1, 2] if name == "in.jsonl" else [None] * 3)
    assert f"3 completions written to {out}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("no.txt", None, "no file"),
        ("empty.txt", "\n \n", "contains no prompts"),
        ("a.jsonl", '{"prompt": "x"}\n{"promt": "x"}\n', 'line 2 has no "prompt"'),
        ("b.jsonl", "{not json\n", "line 1 is not valid JSON"),
    ],
)
def test_mistakes_in_the_file(
    name: str, text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["generate", "--ckpt_path=nowhere.ckpt", f"--input={tmp_path / name}"])
    assert message in capsys.readouterr().err


# export


def test_the_merged_model_is_base_and_adapter(architecture: str, run: Make, tmp_path: Path) -> None:
    """To 1e-5, by plain transformers, and the base in the merged model's place is not touched."""
    path = run(architecture)
    export(path, str(tmp_path / "merged"), merge=True)
    export(path, str(tmp_path / "adapter"))
    trained = load_saved(path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(trained.base), str(tmp_path / "adapter"))
    with torch.no_grad(), trained.backbone.generator():
        wanted = trained.backbone.causal_lm(input_ids=IDS).logits
        torch.testing.assert_close(merged(input_ids=IDS).logits, wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(adapted(input_ids=IDS).logits, wanted, atol=1e-5, rtol=0)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(trained.base)
        assert (plain(input_ids=IDS).logits - wanted).abs().max() > 0.1
    for folder in ("merged", "adapter"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert tokenizer.encode("abc") == trained.backbone.tokenizer.encode("abc")
        settings = GenerationConfig.from_pretrained(tmp_path / folder)
        assert (settings.max_new_tokens, settings.temperature, settings.do_sample) == (7, 0.5, True)
        assert settings.eos_token_id == 256


@pytest.mark.parametrize("merge", [False, True])
def test_the_card_tells_where_it_comes_from(merge: bool, run: Make, tmp_path: Path) -> None:
    path = run()
    export(path, str(tmp_path / "mine"), merge)
    text = (tmp_path / "mine" / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == ("transformers" if merge else "peft")
    for message in (
        "`lora_gan.data.Alpaca`, `yahma/alpaca-cleaned`",
        "| metric | base | trained |",
        "max_new_tokens: 7",
    ):
        assert message in text
    assert "the licences of both apply" in text
    assert load_saved(path).base in text
    code = text.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("'mine'", repr(str(tmp_path / "mine"))), names)
    assert names["model"](input_ids=IDS).logits.shape == (1, 5, 257)


def test_a_checkpoint_alone_is_exported_too(run: Make, tmp_path: Path) -> None:
    path = run()
    (tmp_path / "alone").mkdir()
    shutil.move(path, tmp_path / "alone" / "last.ckpt")
    shutil.rmtree(tmp_path / "run")
    export(str(tmp_path / "alone" / "last.ckpt"), str(tmp_path / "mine"))
    assert "not recorded" in (tmp_path / "mine" / "README.md").read_text(encoding="utf-8")


def test_nothing_is_uploaded_without_the_flag(run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Api:
        def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None:
            calls.append((repository, private))

        def upload_folder(self, repo_id: str, folder_path: Path) -> str:
            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
            return "https://hub/me/mine"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    path = run()
    main(["export", f"--ckpt_path={path}", f"--output={tmp_path / 'mine'}"])
    assert calls == []
    main(["export", f"--ckpt_path={path}", f"--output={tmp_path / 'mine'}", "--push_to_hub=me/mine"])
    assert calls[0] == ("me/mine", True) and {"README.md", "adapter_model.safetensors"} <= set(calls[1][1])
    assert "# me/mine" in (tmp_path / "mine" / "README.md").read_text(encoding="utf-8")


def test_an_upload_that_fails_says_what_to_do(
    run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Api:
        def create_repo(self, *_: Any, **__: Any) -> None:
            raise ConnectionError("offline")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    with pytest.raises(SystemExit):
        main(["export", f"--ckpt_path={run()}", f"--output={tmp_path / 'mine'}", "--push_to_hub=me/mine"])
    assert "was written but could not be uploaded to me/mine: ConnectionError: offline" in capsys.readouterr().err
