"""The ``data`` command: what a configuration will train on, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_gan.cli import main
from lora_gan.data import InstructionDataModule, TruthfulQA
from lora_gan.data.report import report
from lora_gan.data.tokenizer import load_tokenizer
from lora_gan.errors import DataError

ROOT = Path(__file__).parents[3]
FIXTURES = Path(__file__).parents[2] / "fixtures"
SAMPLES = {
    "own": ("alpaca.json", "--data.init_args.source.init_args.template={instruction}", "--data.source.target=output"),
    "alpaca": ("alpaca.json",),
    "dolly": ("dolly.jsonl",),
    "oasst": ("oasst_trees.jsonl",),
    "truthfulqa": ("truthfulqa.csv",),
    "arc": ("arc.jsonl",),
    "twon": ("twon_replies.jsonl",),
}


def run(*arguments: str) -> None:
    main(["data", "--config", str(ROOT / "configs" / "qa.yaml"), *arguments])


def test_the_report_of_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--data.source", "lora_gan.data.ARC", "--data.source.path", str(FIXTURES / "arc.jsonl")]
    run(*settings, "--data.validation", "0", "--data.test", "0", "--data.max_target_tokens", "4")
    printed = capsys.readouterr().out
    assert "arc.jsonl)\nprompts: with the template of the source (the tokenizer has no chat template)\n" in printed
    assert "\ntokenizer builtin; at most 510 tokens of prompt, 4 of target, 512 in total" in printed
    table = [line.split() for line in printed.splitlines()]
    kept = next(int(row[1]) for row in table if row[:1] == ["arc"])
    dropped = sum(int(row[-1]) for row in table if row[:2] == ["train:", "target_too_long"])
    assert kept + dropped == 4
    assert f"fits: {kept / 4:.1%} of the examples" in printed
    assert ["dropped:", "needs_its_choices", "1"] in table
    assert printed.count("──── example ") == min(kept, 3)
    assert "──── target (" in printed and "──── negative (wrong_choice)\n" in printed


@pytest.mark.parametrize("name", ["messages.jsonl", "conversations.json", "completions.csv", "preferences.jsonl"])
def test_a_file_in_a_usual_format_needs_no_configuration(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "--data.path", str(FIXTURES / name)])
    printed = capsys.readouterr().out
    assert f"Data: {Path(name).stem} (" in printed
    assert "──── example 1" in printed
    assert "\\n" not in printed  # group and counts are shown in one line


def test_the_report_counts_what_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "--config", str(ROOT / "configs" / "sft.yaml"), "--data.answered", "0.05", "--data.max_test", "100"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("with an answer"))
    train, validation, test, total = (int(count.replace(",", "")) for count in line.split()[3:])
    assert (validation, test, total) == (128, 100, train + 228)
    assert 3000 < train < 6000, "half of the rows"


def test_counts_are_printed_once(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="lora_gan")
    run("--data.path", str(FIXTURES / "alpaca.json"))
    assert capsys.readouterr().out.count("empty_output") == 1
    assert "empty_output" not in caplog.text


def test_a_split_that_fit_will_miss_is_named_in_the_words_of_fit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Q?", "completion": "A"}')
    data = InstructionDataModule(path=str(path), seed=1)
    printed = report(data)
    warned = [line.removeprefix("warning: ") for line in printed.splitlines() if line.startswith("warning: ")]
    data.setup("fit")
    data.val_dataloader()
    assert [line.split(":")[0] for line in warned] == ["no validation examples", "no test examples"]
    assert warned[0] in caplog.messages

    held_out = InstructionDataModule(TruthfulQA(str(FIXTURES / "truthfulqa.csv")))
    assert "\nwarning: no train examples: fit ends with an error; give more rows" in report(held_out)
    with pytest.raises(DataError, match="leaves no train examples; give more rows"):
        held_out.train_dataloader()


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PERSONA = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Ulla.<|im_end|>\n{% endif %}"


def test_what_the_chat_template_writes_by_itself_is_said(tmp_path: Path) -> None:
    tokenizer: Any = load_tokenizer("builtin")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})

    def printed(template: str, **settings: Any) -> str:
        tokenizer.chat_template = template + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        tokenizer.save_pretrained(tmp_path)
        path = str(FIXTURES / "messages.jsonl")
        return report(InstructionDataModule(path=path, tokenizer=str(tmp_path), **settings))

    said = "where there is no system message, it writes 'system You are Ulla.'; data.init_args.system replaces it"
    assert "prompts: with the tokenizer's chat template (data.init_args.chat: false" in printed(CHATML)
    assert said in printed(PERSONA + CHATML)
    assert "it writes" not in printed(CHATML)
    assert "it writes" not in printed(PERSONA + CHATML, system="Be brief.")


def test_every_turn_with_a_path_of_the_data_module(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "turns.yaml"
    source = {"class_path": "lora_gan.data.StandardFormat", "init_args": {"every_turn": True}}
    config.write_text(json.dumps({"data": {"init_args": {"source": source}}}))
    run("--config", str(config), "--data.path", str(FIXTURES / "messages.jsonl"))
    assert ["messages", "3", "1", "1", "5"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    for arguments, message in (
        (["--config", str(config)], "no data file is named; set data.init_args.path"),
        (["--data.path", ""], "no data file is named; set data.init_args.path"),
        (["--data.source.init_args.every_turn", "true"], "--data.source lora_gan.data.StandardFormat"),
        (["--data.system", "hello"], "data.init_args.system has no effect"),
    ):
        with pytest.raises(SystemExit):
            run(*arguments)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", SAMPLES)
def test_every_data_set_by_its_overlay(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file, *more = SAMPLES[name]
    overlay = ["--config", str(ROOT / "configs" / "data" / f"{name}.yaml"), "--data.path", str(FIXTURES / file)]
    run(*overlay, "--data.max_prompt_tokens", "90", *more)
    printed = capsys.readouterr().out
    assert f"Data: {name if name != 'own' else 'ownfile'} (" in printed
    assert "──── example 1" in printed


def test_a_stream_is_not_described(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--config", str(ROOT / "configs" / "data" / "stream.yaml"))
    assert "error: the data command needs lora_gan.data.InstructionDataModule" in capsys.readouterr().err


def test_every_overlay_is_tried_or_a_stream_or_a_mixture() -> None:
    overlays = {path.stem for path in (ROOT / "configs" / "data").glob("*.yaml")}
    assert overlays == {*SAMPLES, "stream", "mixture"}
