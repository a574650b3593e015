"""HasAdapters on disk: written during a run, loaded by plain PEFT, swapped between runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lora_gan.advantages import ValueGAE
from lora_gan.backbone import DISCRIMINATOR, GENERATOR, LoraSettings
from lora_gan.callbacks import AdapterCheckpoints
from lora_gan.checkpointing.adapters import load_role, save_role, write_roles
from lora_gan.discriminator import HiddenStatesDiscriminator
from lora_gan.errors import LoraGANError
from lora_gan.types import PromptBatch
from tests.conftest import CONFIGS, randomise
from tests.helpers.steps import Build, fit, moved, state, trainer

IDS = torch.tensor([[72, 101, 108, 108, 111]])


def test_plain_peft_loads_each_player(architecture: str, build: Build, bases: dict[str, str], tmp_path: Path) -> None:
    module = build(architecture)
    randomise(module.backbone)
    for role in (GENERATOR, DISCRIMINATOR):
        save_role(module, role, tmp_path / role)
        plain = AutoModelForCausalLM.from_pretrained(bases[architecture])
        adapted = PeftModel.from_pretrained(plain, str(tmp_path / role))
        with torch.no_grad(), module.backbone._mode(role):
            wanted = module.backbone.causal_lm(input_ids=IDS).logits
            torch.testing.assert_close(adapted(input_ids=IDS).logits, wanted, atol=1e-5, rtol=0)


def test_a_player_is_swapped_alone(build: Build, tmp_path: Path) -> None:
    """The generator of one run with the discriminator of another."""
    one, two = build(), build()
    randomise(one.backbone)
    torch.nn.init.ones_(one.backbone.score_head.weight)
    for role in (GENERATOR, DISCRIMINATOR):
        save_role(one, role, tmp_path / role)
    before = state(two)
    started = build(generator_adapter=str(tmp_path / GENERATOR))
    assert {name for name in moved(before, state(started)) if ".generator." not in name} == set()
    outputs = build(discriminator_adapter=str(tmp_path / DISCRIMINATOR))
    changed = moved(before, state(outputs))
    assert all(".discriminator." in name or "score_head" in name for name in changed)
    both = build(generator_adapter=str(tmp_path / GENERATOR), discriminator_adapter=str(tmp_path / DISCRIMINATOR))
    assert not moved(state(one), state(both))


def test_a_swapped_player_learns_on(build: Build, batch: PromptBatch, tmp_path: Path) -> None:
    one = build()
    randomise(one.backbone)
    save_role(one, GENERATOR, tmp_path / GENERATOR)
    module = build(generator_adapter=str(tmp_path / GENERATOR))
    before = state(module)
    recorder, _ = fit(module, [batch], 2)
    assert any(".generator." in name for name in moved(before, recorder.weights[-1]))


def test_heads_travel_with_their_role(build: Build, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": HiddenStatesDiscriminator(width=8, layers=1, heads=2), "advantage": ValueGAE()}
    one = build(**settings)
    for role in (GENERATOR, DISCRIMINATOR):
        save_role(one, role, tmp_path / role)
    assert (tmp_path / GENERATOR / "value_head.pt").is_file() and (tmp_path / DISCRIMINATOR / "model.pt").is_file()
    other = build(**{**settings, "model": HiddenStatesDiscriminator(width=8, layers=1, heads=2)})
    with torch.no_grad():
        for parameter in [*other.discriminator.model.parameters(), *other.generator.value_head.parameters()]:
            parameter.fill_(3.0)
    for role in (GENERATOR, DISCRIMINATOR):
        load_role(other, role, tmp_path / role)
    for mine, theirs in (
        (other.discriminator.model, one.discriminator.model),
        (other.generator.value_head, one.generator.value_head),
    ):
        assert all(map(torch.equal, mine.parameters(), theirs.parameters()))
    wider = build(model=HiddenStatesDiscriminator(width=16, layers=1, heads=2))
    with pytest.raises(LoraGANError, match=r"model\.pt belongs to another discriminator or base"):
        load_role(wider, DISCRIMINATOR, tmp_path / DISCRIMINATOR)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generator_lora": LoraSettings(2, 8)}, r"has rank 4, but the generator has 2: set generator\.lora\.rank"),
        ({"generator_lora": LoraSettings(4, 9)}, r"has alpha 8, but the generator has 9: set generator\.lora\.alpha"),
        ({"generator_lora": LoraSettings(4, 8, ["c_attn"])}, r"other layers; set generator\.lora\.targets"),
        (
            {"architecture": "llama"},
            r"was trained on the base '\S*gpt2\d*', but this base, '\S*llama\d*', has other weights",
        ),
    ],
)
def test_another_adapter_is_refused(settings: dict[str, Any], message: str, build: Build, tmp_path: Path) -> None:
    save_role(build(), GENERATOR, tmp_path)
    with pytest.raises(LoraGANError, match=message):
        build(**settings, generator_adapter=str(tmp_path))


def test_a_base_is_known_by_its_weights(build: Build, bases: dict[str, str], tmp_path: Path) -> None:
    """It may have moved and may be called anything; another one of the same name is refused."""
    save_role(build(generator_lora=LoraSettings(4, 8, ["c_attn"])), GENERATOR, tmp_path / "mine")
    moved_to = shutil.copytree(bases["gpt2"], tmp_path / "elsewhere" / "renamed")
    other = shutil.copytree(bases["gpt2"], tmp_path / "elsewhere" / Path(bases["gpt2"]).name)
    torch.manual_seed(77)
    AutoModelForCausalLM.from_config(CONFIGS["gpt2"]).save_pretrained(other)
    started = {"generator_lora": LoraSettings(4, 8, ["c_attn"]), "generator_adapter": str(tmp_path / "mine")}
    build(base=str(moved_to), **started)
    with pytest.raises(LoraGANError, match=rf"but this base, '{other}', has other weights: set base to "):
        build(base=str(other), **started)
    build(dtype="bfloat16", **started)
    (tmp_path / "mine" / "base.json").unlink()
    build(base=str(other), **started)
    with pytest.raises(LoraGANError, match=r"this base is '\S*renamed': set base to '\S*'; if the two are the same"):
        build(base=str(moved_to), **started)


def test_no_adapter_is_refused(build: Build, tmp_path: Path) -> None:
    with pytest.raises(LoraGANError, match="holds no adapter; give a folder such as checkpoints/step-100/generator"):
        build(generator_adapter=str(tmp_path))


# the callback


def test_the_layout_of_the_seeds(build: Build, batch: PromptBatch, tmp_path: Path, bases: dict[str, str]) -> None:
    callback = AdapterCheckpoints(every_n_steps=2, keep_last=2)
    module = build()
    fit(module, [batch], 7, callback, default_root_dir=tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-4", "step-6"}
    for role in (GENERATOR, DISCRIMINATOR):
        folder = tmp_path / "checkpoints" / "step-6" / role
        expected = {"adapter_config.json", "adapter_model.safetensors", "base.json", "optimizer.pt"}
        expected |= {"head.pt"} if role == DISCRIMINATOR else set()
        assert {path.name for path in folder.iterdir()} == expected
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == bases["gpt2"]
        saved = torch.load(folder / "optimizer.pt", weights_only=True)
        assert {int(entry["step"]) for entry in saved["state"].values()} == {6}
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["gpt2"]), str(folder))
    assert (tmp_path / "checkpoints" / "step-6" / GENERATOR / "adapter_model.safetensors").stat().st_size < 100_000


def test_the_best_stays(build: Build, batch: PromptBatch, tmp_path: Path) -> None:
    """Validations after steps 1, 2, 3 find 0.2, 0.7, 0.4: the best is that of step 2."""
    found = iter([0.2, 0.7, 0.4])

    class Finds(L.Callback):
        def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            pl_module.log("text/found", next(found))

    callback = AdapterCheckpoints(every_n_steps=1, keep_last=0, monitor="text/found")
    module = build()
    runner = trainer(3, Finds(), callback, default_root_dir=tmp_path, val_check_interval=1, num_sanity_val_steps=0)
    loader = DataLoader([batch], batch_size=None)
    runner.fit(module, loader, loader)
    folders = tmp_path / "checkpoints"
    assert {path.name for path in folders.iterdir()} == {"best", "step-1", "step-2", "step-3"}
    for file in (f"{GENERATOR}/adapter_model.safetensors", f"{DISCRIMINATOR}/adapter_model.safetensors"):
        assert (folders / "best" / file).read_bytes() == (folders / "step-2" / file).read_bytes()
        assert (folders / "best" / file).read_bytes() != (folders / "step-3" / file).read_bytes()
    assert callback.state_dict() == {"best": pytest.approx(0.7)}
    with pytest.raises(
        LoraGANError,
        match=r"metric 'text/wrong', the monitor of AdapterCheckpoints, was not logged; available: .*text/found",
    ):
        found = iter([0.1] * 3)
        runner = trainer(
            1,
            Finds(),
            AdapterCheckpoints(monitor="text/wrong"),
            default_root_dir=tmp_path,
            val_check_interval=1,
            num_sanity_val_steps=0,
        )
        runner.fit(build(), loader, loader)


def test_a_folder_is_written_whole_or_not_at_all(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, folder = build(), tmp_path / "step-1"
    optimizers = {role: torch.optim.SGD(module.backbone.parameters_of(role)) for role in (GENERATOR, DISCRIMINATOR)}
    write_roles(module, folder, optimizers)
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    randomise(module.backbone)
    saving = torch.save

    def full(value: object, path: Path) -> None:
        if DISCRIMINATOR in str(path):
            raise OSError("No space left on device")
        saving(value, path)

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(OSError, match="No space"):
        write_roles(module, folder, optimizers)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == whole


def test_settings_are_checked() -> None:
    for wrong in ({"every_n_steps": 0}, {"keep_last": -1}, {"mode": "most"}):
        with pytest.raises(LoraGANError):
            AdapterCheckpoints(**wrong)  # type: ignore[arg-type]
