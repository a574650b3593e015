"""What a run leaves behind is used: asked at the prompt, for a file, and given to others."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config

from lora_gan.backbone import Backbone, load_base
from lora_gan.cli import main
from lora_gan.data import TWON, Alpaca, InstructionDataModule, OwnFile, Source
from lora_gan.data.files import clean
from lora_gan.discriminator import AdapterDiscriminator, CompletionAndTarget
from lora_gan.discriminator.restored import score
from lora_gan.errors import LoraGANError
from lora_gan.export import export
from lora_gan.inference import Saved, _Printer, chat, generate, load_saved
from lora_gan.sampling import Sampling, eos_ids, sample
from lora_gan.types import PromptBatch
from tests.conftest import CONFIGS, randomise
from tests.helpers.steps import Build, fit, trainer

IDS = torch.tensor([[72, 101, 108, 108, 111]])
Make = Callable[..., str]


@pytest.fixture
def run(build: Build, batch: PromptBatch, tmp_path: Path) -> Make:
    """A checkpoint in a run's folder."""

    def make(architecture: str = "gpt2", trained: bool = True, final_answer: Any = None, **settings: Any) -> str:
        module = build(architecture, **settings)
        if trained:
            randomise(module.backbone)
        path = tmp_path / "run" / "checkpoints" / "last.ckpt"
        fit(module, [batch], 1)[1].save_checkpoint(path)
        sampling = {"max_new_tokens": 7, "temperature": 0.5, "no_such": 1}
        config = {
            "model": {"init_args": {"sampling": sampling, "final_answer": final_answer}},
            "data": {"init_args": {"source": {"class_path": "lora_gan.data.Alpaca"}, "path": "yahma/alpaca-cleaned"}},
        }
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        (tmp_path / "run" / "held_out.md").write_text("| metric | base | trained |\n", encoding="utf-8")
        return str(path)

    return make


# chat


def load_backbone(path: str) -> Backbone:
    return load_saved(path).backbone


def ask(monkeypatch: pytest.MonkeyPatch, *questions: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{q}\n" for q in questions)))


def greedy(run: str | Backbone, text: str, role: str = "generator", tokens: int = 5) -> tuple[str, float]:
    """The greedy completion by the sampler, and its score."""
    backbone = load_backbone(run) if isinstance(run, str) else run
    prompt = torch.tensor(backbone.tokenizer.encode(text))
    with backbone.generator() if role == "generator" else backbone.reference():
        rollout = sample(backbone, [prompt], 1, Sampling(max_new_tokens=tokens, do_sample=False))
    ended = rollout.ended(1, backbone.tokenizer.eos_token_id)
    return rollout.texts[0], score(AdapterDiscriminator(), backbone, [prompt], ended).item()


def test_chat_compares_with_the_base(
    run: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run()
    backbone = load_backbone(path)
    ask(monkeypatch, "hi", "", "not asked")
    main(["chat", f"--ckpt_path={path}", "--max_new_tokens=5", "--compare=true", "--template={prompt}"])
    printed = capsys.readouterr().out
    for role, name in (("reference", "base"), ("generator", "generator")):
        completion, score = greedy(backbone, "hi", role)
        assert f"{name:<11}{completion}   (discriminator {score:.2f})\n" in printed
    assert printed.count("(discriminator") == 2


def found_by(pattern: str) -> dict[str, Any]:
    return {"class_path": "lora_gan.final_answer.Pattern", "init_args": {"pattern": pattern}}


LAST_SIGN = r"(\S)\s*$"


def test_chat_shows_the_final_answer_where_work_stands_before_it(
    run: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    completion, score = greedy(load_backbone(run()), "hi")
    last = completion.strip()[-1]
    shown = {LAST_SIGN: f"final answer {last}, ", "(?s)^(.*)$": "", "no such (sign)": ""}
    for pattern, wanted in shown.items():
        path = run(final_answer=found_by(pattern))
        ask(monkeypatch, "hi")
        main(["chat", f"--ckpt_path={path}", "--max_new_tokens=5", "--template={prompt}"])
        assert f"{completion}   ({wanted}discriminator {score:.2f})\n" in capsys.readouterr().out


def test_generate_writes_the_final_answer(run: Make, tmp_path: Path) -> None:
    completion, _ = greedy(load_backbone(run()), "hi")
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi", "answer": 7}\n', encoding="utf-8")

    def written(pattern: str, output_key: str) -> dict[str, Any]:
        path, output = run(final_answer=found_by(pattern)), tmp_path / "out.jsonl"
        how = {"template": "{prompt}", "output_key": output_key, "max_new_tokens": 5}
        generate(path, str(tmp_path / "in.jsonl"), str(output), **how)  # type: ignore[arg-type]
        (line,) = output.read_text(encoding="utf-8").splitlines()
        return dict(json.loads(line))

    found = written(LAST_SIGN, "mine")
    assert list(found) == ["prompt", "answer", "mine", "mine_score", "mine_answer"]
    assert (found["mine"], found["mine_answer"]) == (completion, completion.strip()[-1])
    assert written("no such (sign)", "mine")["mine_answer"] is None
    with pytest.raises(LoraGANError, match=r"line 1 has a field 'answer', .* choose a new name with --output_key"):
        written(LAST_SIGN, "completion")
    broken = load_saved(run(final_answer={"class_path": "no_such.Place"}))
    with pytest.raises(LoraGANError, match=r"no_such\.Place, cannot be imported .*; start from the folder that holds"):
        _ = broken.final_answer


def test_chat_without_a_discriminator_that_scores_alone(
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


def test_a_discriminator_that_never_learned_gives_no_scores(
    run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pure supervised learning: its numbers would be random."""
    path = run(trained=False, policy=0.0, discriminator_updates=0)
    assert not load_saved(path).scores
    ask(monkeypatch, "hi")
    main(["chat", f"--ckpt_path={path}", "--max_new_tokens=5"])
    printed = capsys.readouterr().out
    assert "no scores: the discriminator of this run has never been trained" in printed
    assert "(discriminator" not in printed
    (tmp_path / "in.txt").write_text("one\n", encoding="utf-8")
    assert "score" not in completed(path, tmp_path / "in.txt", tmp_path / "out.jsonl")[0]
    assert load_saved(run(trained=False)).scores, "one update is enough"


def test_tokens_are_shown_as_they_come(run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """A character of two bytes, so of two tokens here, waits for its second."""
    tokenizer = load_backbone(run()).tokenizer
    printer = _Printer(tokenizer)
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
        (["--temperature=.nan"], "temperature must be > 0 and finite, got nan"),
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


def test_settings_of_generation_in_the_base_change_no_answer(
    run: Make,
    bases: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A base that recommends beams, stop strings, forced and suppressed tokens: chat equals generate and training."""
    base = shutil.copytree(bases["gpt2"], tmp_path / "recommends")
    path = run(base=str(base))
    wanted, _ = greedy(path, "hi", tokens=12)
    settings = {
        "num_beams": 4,
        "no_repeat_ngram_size": 1,
        "suppress_tokens": list(range(65, 91)),
        "stop_strings": ["a"],
    }
    GenerationConfig(eos_token_id=256, forced_eos_token_id=256, **settings).save_pretrained(base)
    (tmp_path / "in.txt").write_text("hi\n", encoding="utf-8")
    more = ["--template={prompt}", "--max_new_tokens=12"]
    assert completed(path, tmp_path / "in.txt", tmp_path / "out.jsonl", *more)[0]["completion"] == wanted
    ask(monkeypatch, "hi")
    main(["chat", f"--ckpt_path={path}", *more])
    assert f"{wanted}   (discriminator" in capsys.readouterr().out


# prompts as in training

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QUESTION = "Say hello to all."
ASKED = f"<|user|>{QUESTION}\n<|assistant|>"


@pytest.fixture
def chat_base(bases: dict[str, str], tmp_path: Path) -> str:
    """A base with a chat template."""
    base = shutil.copytree(bases["gpt2"], tmp_path / "chat")
    (base / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    return str(base)


@pytest.fixture
def trained(build: Build, chat_base: str, tmp_path: Path) -> Callable[..., tuple[str, InstructionDataModule]]:
    """A checkpoint that lies alone, and the data that the run was trained on."""

    def make(source: Callable[[str], Source], **settings: Any) -> tuple[str, InstructionDataModule]:
        row = {"instruction": QUESTION, "output": "Hello!", "post": QUESTION, "reply": "Hello, you!"}
        own = {"prompt": QUESTION, "response": "Hello!", "text": QUESTION, "tone": "loud"}
        (tmp_path / "rows.json").write_text(json.dumps([row | own]), encoding="utf-8")
        data = InstructionDataModule(
            source(str(tmp_path / "rows.json")), tokenizer=chat_base, validation=0, test=0, **settings
        )
        module = build(base=chat_base, sampling=Sampling(max_new_tokens=5, temperature=0.7))
        runner = trainer(1)
        runner.fit(module, datamodule=data)
        randomise(module.backbone)
        path = tmp_path / "elsewhere" / "models" / "my.ckpt"
        runner.save_checkpoint(path)
        (tmp_path / "elsewhere" / "config.yaml").write_text("- model: resnet50\n", encoding="utf-8")
        return str(path), data

    return make


@pytest.mark.parametrize(
    ("source", "settings", "text"),
    [
        (Alpaca, {"chat": True}, "<|user|>Say hello to all.\n<|assistant|>"),
        (
            Alpaca,
            {"chat": True, "system": "Be brief."},
            "<|system|>Be brief.\n<|user|>Say hello to all.\n<|assistant|>",
        ),
        (
            partial(TWON, instruction="Reply."),
            {"chat": True},
            "<|system|>Reply.\n<|user|>Say hello to all.\n<|assistant|>",
        ),
        (
            partial(OwnFile, template="In German: {prompt}"),
            {"chat": True},
            "<|user|>In German: Say hello to all.\n<|assistant|>",
        ),
        (partial(OwnFile, template="Q: {prompt}\nA:"), {"chat": False}, "Q: Say hello to all.\nA:"),
        (Alpaca, {"chat": False}, "### Prompt:\nSay hello to all.\n\n### Response:\n"),
    ],
)
def test_a_checkpoint_knows_its_prompts_wherever_it_lies(
    source: Any,
    settings: dict[str, Any],
    text: str,
    trained: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As the data module writes a row with the question, so do chat and generate; beside it lies another's config."""
    path, data = trained(source, **settings)
    saved = load_saved(path)
    prompt = saved.prompt(saved.question(QUESTION)).tolist()
    assert prompt == list(data.splits["train"].items[0].prompt_ids) and saved.backbone.tokenizer.decode(prompt) == text
    assert saved.sampling == Sampling(max_new_tokens=5, temperature=0.7) and saved.config == {}
    completion, _ = greedy(saved.backbone, text)
    ask(monkeypatch, QUESTION)
    main(["chat", f"--ckpt_path={path}", "--max_new_tokens=5"])
    assert f"{completion}   (discriminator" in capsys.readouterr().out
    (tmp_path / "in.txt").write_text(QUESTION, encoding="utf-8")
    assert completed(path, tmp_path / "in.txt", tmp_path / "out.jsonl")[0]["completion"] == completion
    raw = saved.prompt(saved.question(QUESTION, "<{prompt}>"))
    assert saved.backbone.tokenizer.decode(raw) == f"<{QUESTION}>"


def test_rows_of_usual_formats_are_completed(trained: Any, tmp_path: Path) -> None:
    path, _ = trained(Alpaca, chat=True)
    asked = [{"role": "user", "content": "One?"}]
    dialogue = [*asked, {"role": "assistant", "content": "1"}, {"role": "user", "content": "Two?"}]
    rows = [
        {"messages": [*dialogue, {"role": "assistant", "content": "2"}]},
        {"prompt": [{"role": "system", "content": "Be brief."}, *asked], "chosen": "1", "rejected": "2"},
        {"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "1"}]},
        {"prompt": "One?"},
        {"instruction": "One?", "input": "Two!", "output": "3"},
    ]
    texts = [
        "<|user|>One?\n<|assistant|>1\n<|user|>Two?\n",
        "<|system|>Be brief.\n<|user|>One?\n",
        "<|user|>One?\n",
        "<|user|>One?\n",
        "<|user|>One?\n\nTwo!\n",
    ]
    written(tmp_path / "in.jsonl", *rows)
    found = completed(path, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    backbone = load_backbone(path)
    assert [row["completion"] for row in found] == [greedy(backbone, f"{text}<|assistant|>")[0] for text in texts]


def test_chat_keeps_the_conversation(
    trained: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = trained(Alpaca, chat=True)
    prompts: list[str] = []
    asked = Saved.prompt

    def prompt(self: Saved, example: Any) -> torch.Tensor:
        prompts.append(self.backbone.tokenizer.decode(ids := asked(self, example)))
        return ids

    monkeypatch.setattr(Saved, "prompt", prompt)
    ask(
        monkeypatch,
        "I am Bob.",
        "My name?",
        "/reset",
        "/base",
        "And?",
        "/base",
        "/temperature 0.5",
        "x",
        "/help",
        "/quit",
        "no",
    )
    main(["chat", f"--ckpt_path={path}", "--max_new_tokens=5"])
    lines = capsys.readouterr().out.split("\n")
    first, _ = greedy(path, "<|user|>I am Bob.\n<|assistant|>")
    assert "the conversation is kept" in lines[0] and "now the base answers" in " ".join(lines)
    assert prompts[:2] == [
        "<|user|>I am Bob.\n<|assistant|>",
        f"<|user|>I am Bob.\n<|assistant|>{clean(first)}\n<|user|>My name?\n<|assistant|>",
    ]
    assert prompts[2] == "<|user|>And?\n<|assistant|>" and len(prompts) == 4
    assert greedy(path, prompts[2], "base")[0] in "\n".join(lines)


def test_a_temperature_of_0_is_greedy_everywhere_and_nan_is_none(
    run: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """chat refused --temperature 0 and took /temperature 0; /temperature nan was accepted, and inf."""
    path = run()
    ask(monkeypatch, "one", "/temperature nan", "/temperature inf", "/temperature 0", "one")
    main(
        [
            "chat",
            f"--ckpt_path={path}",
            "--max_new_tokens=5",
            "--temperature=0",
            "--template={prompt}",
        ]
    )
    printed = capsys.readouterr().out
    assert printed.count(greedy(path, "one")[0]) == 2
    assert printed.count("/temperature takes a number from 0, such as") == 2
    ask(monkeypatch, "one")
    main(["chat", f"--ckpt_path={path}", "--max_new_tokens=5", "--temperature=9", "--template={prompt}"])
    assert greedy(path, "one")[0] not in capsys.readouterr().out


def test_the_oldest_turns_are_forgotten_where_the_context_ends(
    trained: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = trained(Alpaca, chat=True)
    ask(monkeypatch, "a" * 90, "b" * 90, "c" * 90)
    main(["chat", f"--ckpt_path={path}", "--max_new_tokens=5"])
    assert capsys.readouterr().out.count("the oldest turns no longer fit") == 1


def test_each_question_is_alone_where_training_had_no_dialogues(
    run: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run()
    ask(monkeypatch, "hi", "hi")
    main(["chat", f"--ckpt_path={path}", "--max_new_tokens=5"])
    printed = capsys.readouterr().out
    completion, score = greedy(path, "### Prompt:\nhi\n\n### Response:\n")
    assert (
        "each question is asked alone" in printed and printed.count(f"{completion}   (discriminator {score:.2f})") == 2
    )


def test_sampling_ends_where_the_template_ends_a_turn(build: Build, tmp_path: Path, tokenizer: Any) -> None:
    """The tokenizer's EOS is 256, turns end with 257: targets, stops, scores and exports agree on 257."""
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"additional_special_tokens": ["<turn_end>"]})
    own.chat_template = CHATML.replace("\n", "<turn_end>\n")
    torch.manual_seed(1)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, vocab_size=258, eos_token_id=256)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    own.save_pretrained(tmp_path / "base")
    written(tmp_path / "rows.jsonl", {"instruction": QUESTION, "output": "Hello!"})
    base = str(tmp_path / "base")
    data = InstructionDataModule(path=str(tmp_path / "rows.jsonl"), tokenizer=base, chat=True, validation=0, test=0)
    module, runner = build(base=base), trainer(1)
    runner.fit(module, datamodule=data)
    runner.save_checkpoint(tmp_path / "my.ckpt")
    assert data.splits["train"].items[0].target_ids[-1] == 257
    loaded = load_backbone(str(tmp_path / "my.ckpt"))
    for backbone in (module.backbone, loaded):
        assert eos_ids(backbone) == [256, 257] and backbone.tokenizer.eos_token_id == 257


# the base of a checkpoint


def test_another_base_in_the_old_place_is_refused(run: Make, bases: dict[str, str], tmp_path: Path) -> None:
    base = tmp_path / "mine"
    shutil.copytree(bases["gpt2"], base)
    path = run(base=str(base))
    torch.manual_seed(9)
    AutoModelForCausalLM.from_config(CONFIGS["gpt2"]).save_pretrained(base)
    (tmp_path / "in.txt").write_text("hi\n", encoding="utf-8")
    for use in (
        load_saved,
        partial(generate, input=str(tmp_path / "in.txt")),
        partial(export, output=str(tmp_path / "out")),
    ):
        with pytest.raises(LoraGANError, match=r"has other weights than the base of the checkpoint's run.*--base"):
            use(path)
    assert load_saved(path, bases["gpt2"]).base == bases["gpt2"]


def test_a_base_is_loaded_in_the_number_format_of_its_run(
    run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it had been quantised to 4 bits: on a GPU it is again, elsewhere only plain, and only if that is wanted."""
    path, asked = run(dtype="bfloat16"), list[tuple[Any, ...]]()
    plain = load_saved(path)
    assert plain.backbone.causal_lm.dtype == torch.bfloat16
    checkpoint = torch.load(path, weights_only=True)
    assert (checkpoint["lora_gan"]["dtype"], checkpoint["lora_gan"]["quantization"]) == ("bfloat16", None)
    checkpoint["lora_gan"]["quantization"] = checkpoint["lora_gan"]["fingerprint"]["format"] = "4bit"
    torch.save(checkpoint, path)

    def load(*settings: Any) -> Any:
        asked.append(settings[1:])
        return load_base(settings[0], settings[1])

    monkeypatch.setattr("lora_gan.backbone.load_base", load)
    (tmp_path / "in.txt").write_text("hi\n", encoding="utf-8")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    uses = [load_saved, partial(export, output=str(tmp_path / "out"))]
    uses += [partial(generate, input=str(tmp_path / "in.txt"), output=str(tmp_path / "out.jsonl")), chat]
    for use in uses:
        with pytest.raises(LoraGANError, match=r"quantised to 4bit, .*none was found; --dequantize true .*bfloat16"):
            use(path)
    for use in uses[:-1]:
        use(path, dequantize=True)
    export(path, str(tmp_path / "merged"), merge=True)
    assert set(asked) == {("bfloat16", None)} and len(asked) == 4
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("lora_gan.inference.default_device", lambda: torch.device("cpu"))
    saved = load_saved(path)
    assert asked[4] == ("bfloat16", "4bit") and saved.backbone.fingerprint["format"] == "4bit"


def test_a_base_that_has_moved_is_named(run: Make, bases: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(bases["gpt2"], tmp_path / "here")
    path = run(base=str(tmp_path / "here"))
    wanted = greedy(path, "hi")[0]
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(LoraGANError, match=r"(?s)here', cannot be loaded.*--base"):
        load_saved(path)
    (tmp_path / "in.txt").write_text("hi\n", encoding="utf-8")
    more = [f"--base={tmp_path / 'there'}", "--template={prompt}"]
    assert completed(path, tmp_path / "in.txt", tmp_path / "out.jsonl", *more)[0]["completion"] == wanted


def test_last_is_the_newest_checkpoint_of_the_runs_here(run: Make, work_in: Path) -> None:
    with pytest.raises(LoraGANError, match=r"no run with a checkpoint in .*lightning_logs"):
        load_saved("last")
    path = run()
    folder = work_in / "lightning_logs" / "mine" / "version_0"
    shutil.copytree(Path(path).parents[1], folder)
    assert load_saved("last").settings("data")["path"] == "yahma/alpaca-cleaned"


# generate


def completed(ckpt_path: str, input: Path, output: Path, *more: str) -> list[dict[str, Any]]:
    """What ``generate`` writes."""
    arguments = [f"--ckpt_path={ckpt_path}", f"--input={input}", f"--output={output}", "--max_new_tokens=5", *more]
    main(["generate", *arguments])
    return [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n") if line]


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_file_of_prompts_is_answered(run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In batches of two: the completions are those that each prompt gets alone."""
    path, prompts = run(), ["one", "two and more", "3"]
    written(tmp_path / "in.jsonl", *({"prompt": p, "id": n} for n, p in enumerate(prompts)))
    (tmp_path / "in.txt").write_text("one\n\ntwo and more\n3\n", encoding="utf-8")
    backbone = load_backbone(path)
    wanted = [greedy(backbone, f"<{prompt}>") for prompt in prompts]
    for name in ("in.jsonl", "in.txt"):
        out = tmp_path / "new" / "out.jsonl"
        rows = completed(path, tmp_path / name, out, "--template=<{prompt}>", "--batch_size=2")
        assert [row["prompt"] for row in rows] == prompts
        assert [row["completion"] for row in rows] == [completion for completion, _ in wanted]
        assert [row["score"] for row in rows] == pytest.approx([score for _, score in wanted], abs=1e-5)
        assert [row.get("id") for row in rows] == ([0, 1, 2] if name == "in.jsonl" else [None] * 3)
    assert f"3 completions written to {out}" in capsys.readouterr().out


def test_the_output_may_be_the_input_and_is_whole_or_untouched(
    run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, file = run(), tmp_path / "p.jsonl"
    before = written(file, {"prompt": "short"}, {"prompt": "x" * 300}).read_bytes()
    with pytest.raises(SystemExit):
        completed(path, file, file)
    assert "1 prompts are too long: that of" in (error := capsys.readouterr().err) and "line 2 has" in error
    assert file.read_bytes() == before
    written(file, {"prompt": "short", "id": 1})
    assert completed(path, file, file)[0].keys() == {"prompt", "id", "completion", "score"}
    assert sorted(tmp_path.glob("*.jsonl")) == [file]


def test_fields_of_the_rows_are_not_overwritten(run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, gold = run(), {"prompt": "Capital?", "completion": "Paris (gold)", "score": 5}
    for row in (gold, {"prompt": "Capital?", "score": 5}):
        with pytest.raises(SystemExit):
            completed(path, written(tmp_path / "gold.jsonl", row), tmp_path / "out.jsonl")
        assert "which would be overwritten; choose a new name with --output_key" in capsys.readouterr().err
    written(tmp_path / "gold.jsonl", gold)
    (row,) = completed(path, tmp_path / "gold.jsonl", tmp_path / "out.jsonl", "--output_key=mine")
    assert row.items() >= gold.items() and row.keys() == {*gold, "mine", "mine_score"}


@pytest.mark.parametrize("template", [[], ["--template={prompt}"]], ids=["run's", "own"])
def test_half_of_a_character_in_a_prompt_loses_no_completions(run: Make, tmp_path: Path, template: list[str]) -> None:
    (tmp_path / "in.jsonl").write_text(r'{"prompt": "é \ud800b"}' + "\n" + r'{"prompt": "é b"}')
    half, whole = completed(run(), tmp_path / "in.jsonl", tmp_path / "out.jsonl", *template)
    assert (half["prompt"], whole["prompt"]) == ("é \ud800b", "é b")
    assert half["completion"] == whole["completion"]


def test_only_a_line_feed_ends_a_prompt(run: Make, tmp_path: Path) -> None:
    """Line separators of Unicode are text; a byte order mark and carriage returns are not."""
    path, prompts = run(), ["What is\u2028this?", "one\u0085prompt"]
    backbone = load_backbone(path)
    wanted = [greedy(backbone, prompt)[0] for prompt in prompts]
    written(tmp_path / "in.jsonl", *({"prompt": prompt} for prompt in prompts))
    (tmp_path / "in.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(prompts).encode())
    for name in ("in.jsonl", "in.txt"):
        rows = completed(path, tmp_path / name, tmp_path / "out.jsonl", "--template={prompt}")
        assert [row["prompt"] for row in rows] == prompts and [row["completion"] for row in rows] == wanted


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("no.txt", None, "no file"),
        ("empty.txt", "\n \n", "empty"),
        ("a.jsonl", '{"prompt": "x"}\n{"promt": "x"}\n', 'line 2 has no "prompt"'),
        ("b.jsonl", "{not json\n", "line 1, column 2: not valid JSON"),
        ("c.jsonl", '{"prompt": ""}\n', "line 1: the prompt is empty"),
        ("latin.txt", b"caf\xe9", "is not valid UTF-8"),
        ("d.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', "leave out --template"),
    ],
)
def test_mistakes_in_the_file(
    name: str, text: str | bytes | None, message: str, run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    loads = name in ("a.jsonl", "c.jsonl", "d.jsonl")
    more = [] if name == "a.jsonl" else ["--template={prompt}"]
    with pytest.raises(SystemExit):
        completed(run() if loads else "nowhere.ckpt", tmp_path / name, tmp_path / "out.jsonl", *more)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--output_key=", "output_key is empty"),
        ("--temperature=.nan", "finite, got nan"),
        ("--top_p=0.9", "no effect at temperature 0"),
    ],
)
def test_mistakes_in_the_settings(given: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        completed("nowhere.ckpt", tmp_path / "in.txt", tmp_path / "out.jsonl", given)
    assert message in capsys.readouterr().err


def test_where_nothing_can_be_written_is_said_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("hi\n", encoding="utf-8")
    for output in (tmp_path / "in.txt" / "out.jsonl", tmp_path):
        with pytest.raises(SystemExit):
            completed("nowhere.ckpt", tmp_path / "in.txt", output)
        assert f"cannot write {output}" in capsys.readouterr().err


def test_a_pipe_is_written_to_and_not_replaced(run: Make, tmp_path: Path) -> None:
    """The output of ``--output /dev/null`` was a new file in its place."""
    path, pipe, lines = run(), tmp_path / "pipe", list[str]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: lines.extend(pipe.read_text(encoding="utf-8").splitlines()))
    reader.start()
    input = written(tmp_path / "in.jsonl", {"prompt": "one"}, {"prompt": "two"})
    main(["generate", f"--ckpt_path={path}", f"--input={input}", f"--output={pipe}", "--max_new_tokens=2"])
    reader.join(timeout=60)
    assert pipe.is_fifo() and [json.loads(line)["prompt"] for line in lines] == ["one", "two"]


def test_what_a_link_points_to_is_replaced(run: Make, tmp_path: Path) -> None:
    path, link = run(), tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "elsewhere" / "out.jsonl")
    for prompt in ("one", "two"):  # there is no such file yet, and there is one
        (row,) = completed(path, written(tmp_path / "in.jsonl", {"prompt": prompt}), link)
        assert row["prompt"] == prompt and link.is_symlink()
    assert [file.name for file in (tmp_path / "elsewhere").iterdir()] == ["out.jsonl"]


def test_a_dash_is_the_standard_output(run: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, input = run(), written(tmp_path / "in.jsonl", {"prompt": "é"})
    capfd.readouterr()
    main(["generate", f"--ckpt_path={path}", f"--input={input}", "--output", "-", "--max_new_tokens=2"])
    assert json.loads(capfd.readouterr().out)["prompt"] == "é"  # and nothing else
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.jsonl", "run"]
