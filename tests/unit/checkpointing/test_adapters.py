"""HasAdapters on disk: written during a run, loaded by plain PEFT, swapped between runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lora_gan import LoraGAN
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


def test_plain_peft_loads_each_role(architecture: str, build: Build, bases: dict[str, str], tmp_path: Path) -> None:
    module = build(architecture)
    randomise(module.backbone)
    for role in (GENERATOR, DISCRIMINATOR):
        save_role(module, role, tmp_path / role)
        plain = AutoModelForCausalLM.from_pretrained(bases[architecture])
        adapted = PeftModel.from_pretrained(plain, str(tmp_path / role))
        with torch.no_grad(), module.backbone._mode(role):
            wanted = module.backbone.causal_lm(input_ids=IDS).logits
            torch.testing.assert_close(adapted(input_ids=IDS).logits, wanted, atol=1e-5, rtol=0)


def test_a_role_is_swapped_alone(build: Build, tmp_path: Path) -> None:
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


def test_a_swapped_role_continues_to_learn(build: Build, batch: PromptBatch, tmp_path: Path) -> None:
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


# adapters of plain PEFT


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits.log_softmax(-1)
    return found


def peft_adapter(base: str, folder: Path, **settings: Any) -> Tensor:
    """Write an adapter whose matrices are all random; returns the log-probabilities that PEFT itself loads."""
    torch.manual_seed(8)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**lora))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                parameter.normal_(0, 0.2)
            if "magnitude" in name:
                parameter.mul_(1.3)
    model.save_pretrained(str(folder))
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval())


@pytest.mark.parametrize(
    ("architecture", "targets", "more"),
    [
        ("gpt2", "all-linear", {}),
        ("llama", "all-linear", {"lora_dropout": 0.3, "init_lora_weights": "gaussian"}),
        ("llama", "all-linear", {"use_rslora": True}),
        ("llama", "all-linear", {"use_dora": True}),
        ("gpt2", "all-linear", {"use_dora": True, "use_rslora": True}),
        ("gpt2", ["c_attn", "lm_head"], {}),  # tied
        ("gpt2", ["c_attn", "wte"], {}),
        ("llama", ["q_proj", "embed_tokens", "lm_head"], {}),
        ("llama", ["q_proj", "embed_tokens"], {"use_dora": True}),
    ],
)
def test_an_adapter_of_peft_means_here_what_it_means_there(
    architecture: str, targets: Any, more: dict[str, Any], build: Build, bases: dict[str, str], tmp_path: Path
) -> None:
    """Loaded, saved again and loaded by PEFT: the same log-probabilities."""
    wanted = peft_adapter(bases[architecture], tmp_path / "theirs", target_modules=targets, **more)
    options = {name: value for name, value in more.items() if name.startswith("use_")}
    lora = LoraSettings(4, 8, targets, **options)
    module = build(architecture, generator_lora=lora, generator_adapter=str(tmp_path / "theirs"))
    with module.backbone.generator():
        torch.testing.assert_close(logits(module.backbone.causal_lm), wanted, atol=1e-5, rtol=0)
    save_role(module, GENERATOR, tmp_path / "mine")
    plain = AutoModelForCausalLM.from_pretrained(bases[architecture])
    assert (logits(plain) - wanted).abs().max() > 0.1
    again = PeftModel.from_pretrained(plain, str(tmp_path / "mine"))
    torch.testing.assert_close(logits(again), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"alpha_pattern": {"q_proj": 64}}, "uses alpha_pattern"),
        ({"rank_pattern": {"q_proj": 2}}, "uses rank_pattern"),
        ({"init_lora_weights": "pissa"}, "was initialised by 'pissa', which changes the weights of the base"),
        ({"init_lora_weights": "olora"}, "was initialised by 'olora', which changes the weights of the base"),
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
        ({"bias": "all"}, "uses bias"),
        ({"lora_bias": True}, "uses lora_bias"),
        ({"layers_to_transform": [0], "target_modules": ["q_proj"]}, "uses layers_to_transform"),
        ({"trainable_token_indices": [1, 2]}, "uses trainable_token_indices"),
    ],
)
def test_what_an_adapter_of_peft_cannot_mean_here_is_refused(
    more: dict[str, Any], reason: str, build: Build, bases: dict[str, str], tmp_path: Path
) -> None:
    peft_adapter(bases["llama"], tmp_path / "theirs", **more)
    with pytest.raises(LoraGANError, match=rf"{reason}.*: merge it into its base \(merge_and_unload of PEFT\)"):
        build("llama", generator_adapter=str(tmp_path / "theirs"))


def test_word_embeddings_beside_an_adapter_are_those_of_the_base(
    build: Build, bases: dict[str, str], tmp_path: Path
) -> None:
    """PEFT saves them where they have an adapter, and loads them over the base's."""
    peft_adapter(bases["llama"], tmp_path, target_modules=["q_proj", "embed_tokens"])
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({**tensors, name: tensors[name] + 1}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(LoraGANError, match=rf"comes with other weights of the base \({name}\): merge it"):
        build("llama", generator_lora=LoraSettings(4, 8, ["q_proj", "embed_tokens"]), generator_adapter=str(tmp_path))


def test_another_kind_of_adapter_is_refused(build: Build, bases: dict[str, str], tmp_path: Path) -> None:
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["c_attn"], feedforward_modules=[])
    get_peft_model(AutoModelForCausalLM.from_pretrained(bases["gpt2"]), config).save_pretrained(str(tmp_path))
    with pytest.raises(LoraGANError, match=r"is of the kind .*IA3, and the roles are LoRA adapters"):
        build(generator_adapter=str(tmp_path))


def test_an_adapter_says_which_settings_it_needs(build: Build, bases: dict[str, str], tmp_path: Path) -> None:
    """By the keys of the settings, with its own values."""
    peft_adapter(bases["gpt2"], tmp_path, target_modules=["c_attn", "c_fc"], use_dora=True)
    for given, message in (
        (LoraSettings(4, 8), r"has use_dora True, .*: set generator\.lora\.use_dora to True"),
        (LoraSettings(4, 8, use_dora=True), r"set generator\.lora\.targets to \['c_attn', 'c_fc'\]"),
    ):
        with pytest.raises(LoraGANError, match=message):
            build(generator_lora=given, generator_adapter=str(tmp_path))


# damaged files


@pytest.fixture
def written(build: Build, tmp_path: Path) -> Path:
    for role in (GENERATOR, DISCRIMINATOR):
        save_role(build(), role, tmp_path / role)
    return tmp_path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil(path: Path) -> None:
    """One byte in the middle changes."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def pickled(path: Path) -> None:
    torch.save({"weight": Malicious()}, path)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("adapter_model.safetensors", cut, "is damaged .*SafetensorError.*; copy or download it again"),
        ("adapter_config.json", cut, "is damaged .*JSONDecodeError.*; copy or download it again"),
        ("base.json", cut, "base.json is damaged"),
        ("head.pt", cut, "head.pt is damaged"),
        ("head.pt", spoil, "head.pt is damaged"),
        ("head.pt", pickled, "head.pt was not written by lora-gan: it contains more than tensors and plain values"),
    ],
)
def test_a_damaged_file_is_one_clear_error(
    file: str, damage: Callable[[Path], None], message: str, written: Path, build: Build, work_in: Path
) -> None:
    damage(written / DISCRIMINATOR / file)
    with pytest.raises(LoraGANError, match=message):
        build(discriminator_adapter=str(written / DISCRIMINATOR))
    assert not Path("executed").exists()


@pytest.mark.parametrize("file", ["state.pt", "generator/optimizer.pt"])
def test_a_damaged_checkpoint_of_the_library_is_one_clear_error(
    file: str, bases: dict[str, str], work_in: Path
) -> None:
    gan = LoraGAN(bases["gpt2"], compute_reward=lambda response, target: 1.0, seed=0)
    folder = gan.save_checkpoint(1)
    for damage, message in ((cut, "is damaged"), (pickled, "contains more than tensors and plain values")):
        damage(Path(folder) / file)
        with pytest.raises(LoraGANError, match=message):
            gan.load_checkpoint(1)
    assert not Path("executed").exists()


def test_weights_can_be_read_by_others(written: Path) -> None:
    """safetensors writes files that only their owner can read."""
    modes = {path.name: path.stat().st_mode & 0o777 for path in (written / GENERATOR).iterdir()}
    assert modes["adapter_model.safetensors"] == modes["adapter_config.json"] == modes["base.json"]


def test_an_older_head_does_not_stay(build: Build, tmp_path: Path) -> None:
    save_role(build(advantage=ValueGAE()), GENERATOR, tmp_path / GENERATOR)
    save_role(build(), GENERATOR, tmp_path / GENERATOR)
    assert not (tmp_path / GENERATOR / "value_head.pt").exists()


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
