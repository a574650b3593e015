"""What an export holds: the generator as trained, loaded by plain PEFT and plain transformers, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from lora_gan.backbone import LoraSettings
from lora_gan.cli import main
from lora_gan.data import InstructionDataModule, OwnFile
from lora_gan.errors import LoraGANError
from lora_gan.export import CARD, NEW_CARD, QUESTION, export, public
from lora_gan.inference import generate, load_saved
from lora_gan.module import LoraGANModule
from lora_gan.results import Result, save_result
from tests.conftest import COMMON, CONFIGS, WIDTHS, randomise, tiny
from tests.helpers.settings import grouped
from tests.helpers.steps import Build, trainer

IDS = torch.tensor([[72, 101, 108, 108, 111]])
Make = Callable[..., str]
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "base.json"}
SHARED = {"README.md", "export.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
TEMPLATE = "User: {prompt}\nBot:"
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_run(folder: Path, module: LoraGANModule, data: Mapping[str, Any]) -> str:
    """A run's folder with a checkpoint after one step, private rows and paths, and the results of two steps."""
    rows = folder / "private.jsonl"
    rows.write_text('{"prompt": "My secret?", "response": "Bob."}\n', encoding="utf-8")
    read = OwnFile(str(rows), template=TEMPLATE)
    randomise(module.backbone)
    runner = trainer(1)
    runner.fit(module, datamodule=InstructionDataModule(read, tokenizer=module.base, validation=0, test=0, **data))
    runner.save_checkpoint(folder / "run" / "checkpoints" / "best-1.ckpt")
    config = {
        "model": {"init_args": {"base": module.base, "num_generations": 2}},
        "data": {"init_args": {"source": {"class_path": "lora_gan.data.OwnFile"}, "path": str(rows)}},
    }
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for step, value in ((1, 0.111), (2, 0.222)):
        result = Result(f"best-{step}.ckpt", step, "OwnFile", 3, {"base": {"f1": 0.5}, "trained": {"f1": value}})
        save_result(folder / "run", result)
    return str(folder / "run" / "checkpoints" / "best-1.ckpt")


@pytest.fixture(scope="module")
def usual_run(bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(4)
    return Path(write_run(tmp_path_factory.mktemp("usual"), LoraGANModule(**grouped(tiny(bases["gpt2"]))), {}))


@pytest.fixture
def run(build: Build, usual_run: Path, tmp_path: Path) -> Make:
    """Makes a run, or copies the usual one, and returns its checkpoint."""

    def make(architecture: str = "gpt2", data: Mapping[str, Any] = MappingProxyType({}), **settings: Any) -> str:
        if settings or data or architecture != "gpt2":
            return write_run(tmp_path, build(architecture, **settings), data)
        copied = shutil.copytree(usual_run.parents[1], tmp_path / "run")
        return str(copied / "checkpoints" / usual_run.name)

    return make


def logprobs(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits.log_softmax(-1)
    return found


def trained(ckpt_path: str) -> Tensor:
    """The log-probabilities of the checkpoint's generator."""
    backbone = load_saved(ckpt_path).backbone
    with backbone.generator():
        return logprobs(backbone.causal_lm)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


# round trips


def test_every_way_back_gives_the_generator(architecture: str, run: Make, build: Build, tmp_path: Path) -> None:
    """Adapter → PEFT, adapter → a new run, merged into the folder of the adapter → transformers."""
    path, folder = run(architecture), tmp_path / "out"
    wanted, base = trained(path), load_saved(path).base
    export(path, str(folder))
    assert files(folder) == SHARED | ADAPTER
    close(logprobs(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))), wanted)
    started = build(architecture, generator_adapter=str(folder)).backbone
    with started.generator():
        close(logprobs(started.causal_lm), wanted)
    export(path, str(folder), merge=True)
    assert files(folder) == SHARED | {"config.json", "model.safetensors"}
    close(logprobs(AutoModelForCausalLM.from_pretrained(folder)), wanted)
    assert (logprobs(AutoModelForCausalLM.from_pretrained(base)) - wanted).abs().max() > 0.1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("abc") == load_saved(path).backbone.tokenizer.encode("abc")


TIED = LlamaConfig(intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True, **WIDTHS, **COMMON)


@pytest.mark.parametrize(
    ("config", "targets", "more"),
    [
        (CONFIGS["gpt2"], ["c_attn", "lm_head"], {}),
        (TIED, ["q_proj", "embed_tokens"], {"use_rslora": True}),
        (TIED, ["q_proj", "embed_tokens", "lm_head"], {}),
        (TIED, "all-linear", {"use_dora": True}),
        (CONFIGS["llama"], ["q_proj", "embed_tokens", "lm_head"], {"use_dora": True}),
    ],
)
def test_adapters_on_tied_embeddings_are_merged_right(
    config: Any, targets: Any, more: dict[str, Any], run: Make, bases: dict[str, str], tmp_path: Path
) -> None:
    """Head and embeddings are one tensor in the base and two in the export."""
    base = shutil.copytree(bases["gpt2"], tmp_path / "base")
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    path = run(base=str(base), generator_lora=LoraSettings(4, 8, targets, **more))
    shift(path)
    wanted = trained(path)
    export(path, str(tmp_path / "merged"), merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    close(logprobs(merged), wanted)
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert (logprobs(plain) - wanted).abs().max() > 0.1
    export(path, str(tmp_path / "adapter"))
    close(logprobs(PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))), wanted)


def shift(path: str) -> None:
    """Random weights for the adapters on embeddings, which start at 0, and for DoRA's magnitudes."""
    checkpoint = torch.load(path, weights_only=True)
    for name, weight in checkpoint["state_dict"].items():
        if "lora_embedding" in name:
            weight.normal_(0, 0.2)
        if "magnitude" in name:
            weight.mul_(1.2)
    torch.save(checkpoint, path)


# the folder


def test_nothing_of_an_older_export_stays(run: Make, build: Build, tmp_path: Path) -> None:
    """transformers would load an adapter that lies beside a merged model on top of it."""
    path, folder = run(), tmp_path / "out"
    export(path, str(folder))
    before = trained(path)
    checkpoint = torch.load(path, weights_only=True)
    for name, weight in checkpoint["state_dict"].items():
        if "lora_B" in name:
            weight.mul_(-1)
    torch.save(checkpoint, path)
    export(path, str(folder), merge=True)
    loaded = logprobs(AutoModelForCausalLM.from_pretrained(folder))
    close(loaded, trained(path))
    assert (loaded - before).abs().max() > 0.1


def test_a_folder_with_other_files_is_refused(run: Make, tmp_path: Path) -> None:
    path, folder = run(), tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(LoraGANError, match=r"not of an earlier export, such as thesis\.txt.*--output"):
        export(path, str(folder))
    export(path, str(tmp_path / "out"))
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(LoraGANError, match=r"such as thesis\.txt"):
        export(path, str(tmp_path / "out"), merge=True)
    with pytest.raises(LoraGANError, match="is a file; choose a folder"):
        export(path, str(folder / "thesis.txt"))
    assert (folder / "thesis.txt").read_text() == "years of work" and (tmp_path / "out" / "thesis.txt").is_file()


def test_a_readme_of_ones_own_stays(run: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, folder = run(), tmp_path / "out"
    folder.mkdir()
    (folder / CARD).write_text("my words")
    export(path, str(folder))
    assert "is your own and stays; the new model card is MODEL_CARD.md" in caplog.text
    for _ in range(2):
        export(path, str(folder), merge=True)
        assert (folder / CARD).read_text() == "my words" and "merged model" in (folder / NEW_CARD).read_text().lower()
    (folder / CARD).unlink()
    export(path, str(folder))
    export(path, str(folder), merge=True)
    assert "# out" in (folder / CARD).read_text() and not (folder / NEW_CARD).exists()


def test_an_export_that_fails_leaves_the_older_one(run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, folder = run(), tmp_path / "out"
    export(path, str(folder))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    saved = load_saved(path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(type(saved.backbone.tokenizer), "save_pretrained", full)
    with pytest.raises(LoraGANError, match=r"cannot write .*out: No space left on device; choose another folder"):
        export(path, str(folder), merge=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("merge", [False, True])
def test_others_can_read_the_weights(merge: bool, run: Make, tmp_path: Path) -> None:
    export(run(), str(tmp_path / "out"), merge)
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert len(modes) == 1, "a web server or a container reads all files or none"


# the base


def test_a_changed_base_is_refused_and_a_moved_one_given(run: Make, bases: dict[str, str], tmp_path: Path) -> None:
    base = shutil.copytree(bases["gpt2"], tmp_path / "base")
    path = run(base=str(base))
    wanted = trained(path)
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(LoraGANError, match="say where it is now with --base"):
        export(path, str(tmp_path / "out"))
    export(path, str(tmp_path / "out"), merge=True, base=str(moved))
    close(logprobs(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), wanted)
    torch.manual_seed(77)
    AutoModelForCausalLM.from_config(CONFIGS["gpt2"]).save_pretrained(moved)
    with pytest.raises(LoraGANError, match="has other weights than the base of the checkpoint's run"):
        export(path, str(tmp_path / "out"), base=str(moved))


# the card


def code_of(folder: Path) -> str:
    """The card's code, which names the export by its folder's name."""
    text = (folder / CARD).read_text(encoding="utf-8")
    return text.split("```python\n")[1].split("```")[0].replace(repr(folder.name), repr(str(folder)))


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_the_code_of_the_card_completes_as_generate_does(
    merge: bool,
    chat: bool,
    run: Make,
    bases: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the run's template, greedily, and without the generation settings of the base."""
    base = shutil.copytree(bases["gpt2"], tmp_path / "base")
    GenerationConfig(no_repeat_ngram_size=1, do_sample=True, eos_token_id=256).save_pretrained(base)
    if chat:
        (base / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    path = run(base=str(base), data={"chat": True, "system": "Be brief."} if chat else {})
    (tmp_path / "in.txt").write_text(QUESTION, encoding="utf-8")
    generate(path, str(tmp_path / "in.txt"), str(tmp_path / "out.jsonl"))
    export(path, str(tmp_path / "mine"), merge)
    capsys.readouterr()
    code = code_of(tmp_path / "mine")
    names: dict[str, Any] = {}
    exec(code, names)
    wanted = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))["completion"]
    assert capsys.readouterr().out == wanted + "\n" and len(wanted) > 10
    asked = TEMPLATE.format(prompt=QUESTION)
    prompt = f"<|system|>Be brief.\n<|user|>{asked}\n<|assistant|>" if chat else asked
    assert names["tokenizer"].decode(names["inputs"]["input_ids"][0]) == prompt
    assert ("apply_chat_template" in code) == chat


@pytest.mark.parametrize("merge", [False, True])
def test_the_card_says_which_weights_and_their_results_only(merge: bool, run: Make, tmp_path: Path) -> None:
    export(run(), str(tmp_path / "mine"), merge)
    text = (tmp_path / "mine" / CARD).read_text(encoding="utf-8")
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == ("transformers" if merge else "peft") and "base_model" not in header
    for message in (
        "the weights of step 1 (best-1.ckpt)",
        "| f1 | 0.500 | 0.111 |",
        "`lora_gan.data.OwnFile`, `private.jsonl`",
        "the licences of both apply",
        "num_generations: 2",
    ):
        assert message in text
    assert "0.222" not in text, "of another step"


def test_the_card_without_a_test_of_these_weights(run: Make, tmp_path: Path) -> None:
    path = run()
    (tmp_path / "run" / "results.json").unlink()
    export(path, str(tmp_path / "mine"))
    assert "not recorded: these weights were not tested" in (tmp_path / "mine" / CARD).read_text(encoding="utf-8")


@pytest.mark.parametrize("merge", [False, True])
def test_the_card_holds_nothing_private(merge: bool, run: Make, tmp_path: Path) -> None:
    (path := Path(run())).parents[1].joinpath("held_out.md").write_text("| My secret? | Bob. |")
    export(str(path), str(tmp_path / "mine"), merge)
    for file in (tmp_path / "mine").glob("*.*"):
        if file.suffix in (".md", ".json") and file.name != "adapter_config.json":  # PEFT finds the base by it
            text = file.read_text(encoding="utf-8")
            assert str(tmp_path) not in text and "secret" not in text and "/tmp" not in text, file.name


def test_only_local_paths_are_shortened(tmp_path: Path) -> None:
    given = {"path": str(tmp_path / "a" / "b.json"), "base": "yahma/alpaca", "c": ["./x/y.csv", 1, None, "a / b"]}
    assert public(given) == {"path": "b.json", "base": "yahma/alpaca", "c": ["y.csv", 1, None, "a / b"]}


def test_a_checkpoint_alone_is_exported_too(run: Make, tmp_path: Path) -> None:
    path = run()
    (tmp_path / "alone").mkdir()
    shutil.move(path, tmp_path / "alone" / "last.ckpt")
    shutil.rmtree(tmp_path / "run")
    export(str(tmp_path / "alone" / "last.ckpt"), str(tmp_path / "mine"))
    text = (tmp_path / "mine" / CARD).read_text(encoding="utf-8")
    assert "not recorded: the checkpoint is not in the folder of its run" in text and "User: What is the" in text


# the hub


def test_nothing_is_uploaded_without_the_flag(
    run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, Any]] = []

    class Api:
        def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None:
            calls.append((repository, private))

        def upload_folder(self, repo_id: str, folder_path: Path) -> str:
            calls.append((repo_id, files(Path(folder_path))))
            return "https://hub/me/mine"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    path = run()
    main(["export", f"--ckpt_path={path}", f"--output={tmp_path / 'mine'}"])
    assert calls == []
    main(["export", f"--ckpt_path={path}", f"--output={tmp_path / 'mine'}", "--push_to_hub=me/mine"])
    assert calls == [("me/mine", True), ("me/mine", SHARED | ADAPTER)]
    assert "# me/mine" in (tmp_path / "mine" / CARD).read_text(encoding="utf-8")
    assert "uploading to me/mine (private if it is new): README.md, adapter_config.json" in capsys.readouterr().out


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
