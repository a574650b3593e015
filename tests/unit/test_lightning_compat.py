"""Private API: each function does on the real libraries what its name says, and says what a new version lacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.cache_utils import DynamicLayer

from lora_gan import lightning_compat as compat
from lora_gan.advantages import ValueGAE
from lora_gan.backbone import Backbone, LoraSettings
from lora_gan.cli.training import CLI
from lora_gan.discriminator import HiddenStatesDiscriminator
from lora_gan.errors import LoraGANError
from lora_gan.stepper import Stepper
from lora_gan.types import PromptBatch
from tests.conftest import randomise
from tests.helpers.steps import Build


class TwoOptimizers(L.LightningModule):
    """Notes what the functions say in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layer = nn.Linear(1, 1)
        self.notes: list[dict[str, Any]] = []

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        with compat.count_one_step(self.trainer, optimizers):
            for optimizer in optimizers:
                optimizer.zero_grad()
                self.layer(batch).sum().backward()
                optimizer.step()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        self.notes.append(
            {
                "step": self.trainer.global_step,
                "last": compat.is_last_batch(self.trainer),
                "validates": compat.validates_after_this_batch(self.trainer),
                "fitting": compat.is_fitting(self),
            }
        )


def fit(**settings: Any) -> TwoOptimizers:
    module = TwoOptimizers()
    loader = DataLoader(torch.ones(5, 1))  # type: ignore[arg-type]
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )
    trainer.fit(module, loader, loader)
    return module


def test_a_fit_in_which_each_step_counts_once() -> None:
    module = fit(max_epochs=1, val_check_interval=2)
    assert [note["step"] for note in module.notes] == [1, 2, 3, 4, 5]
    assert [note["last"] for note in module.notes] == [False] * 4 + [True]
    assert [note["validates"] for note in module.notes] == [False, True, False, True, False]
    assert all(note["fitting"] for note in module.notes)
    module.trainer.validate(module, DataLoader(torch.ones(1, 1)), verbose=False)  # type: ignore[arg-type]
    assert not compat.is_fitting(module)
    assert not compat.is_fitting(TwoOptimizers()), "without a trainer"
    compat.set_global_step(module.trainer, 40)
    assert module.trainer.global_step == 40
    assert compat.share_of_process(module.trainer) == {"num_replicas": 1, "rank": 0} == compat.share_of_process(None)


def test_max_steps_counts_steps() -> None:
    assert len(fit(max_steps=3).notes) == 3


def test_steps_that_are_counted_otherwise_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Lightning called other hooks of its optimizers than those that are replaced."""

    def step(optimizer: Any) -> None:
        trainer = optimizer._strategy.lightning_module.trainer
        trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.increment_completed()

    monkeypatch.setattr("lightning.pytorch.core.optimizer.LightningOptimizer.step", step)
    with pytest.raises(LoraGANError, match="Trainer counted 3 steps instead of one in this version"):
        fit(max_steps=3)


def test_the_share_of_a_process() -> None:
    trainer: Any = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": 1})
    assert compat.share_of_process(trainer) == {"num_replicas": 2, "rank": 1}


def test_a_run_continues_in_its_folder(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, "gan")
    (tmp_path / "gan" / "version_0").mkdir(parents=True)
    assert not compat.has_version(logger)
    compat.set_version(logger, "version_0")
    assert compat.has_version(logger)
    assert Path(logger.log_dir) == tmp_path / "gan" / "version_0"
    compat.set_version(logger, 7)
    assert Path(logger.log_dir) == tmp_path / "gan" / "version_7"


def test_a_setting_of_the_subcommand() -> None:
    cli = object.__new__(LightningCLI)
    cli.config, cli.subcommand = {"fit": {"ckpt_path": "x"}}, "fit"  # type: ignore[assignment]
    assert compat.subcommand_setting(cli, "ckpt_path") == "x"
    assert compat.subcommand_setting(cli, "other") is None


def test_overrides_replace_what_lightning_and_transformers_call() -> None:
    assert CLI._parse_ckpt_path is not LightningCLI._parse_ckpt_path
    with pytest.raises(LoraGANError, match=r"transformers\.cache_utils\.DynamicLayer has no grow in this version"):

        class Layer(DynamicLayer):  # type: ignore[misc]
            @compat.overrides(DynamicLayer)
            def grow(self) -> None: ...


class Nothing:
    """A trainer, module, logger or command line of a version without what is needed."""

    trainer = fit_loop = epoch_loop = profiler = property(lambda self: self)
    global_step = 0


NOTHING: Any = Nothing()
WITHOUT: dict[str, tuple[str, Callable[[], Any]]] = {
    "count_one_step": ("_on_before_step", lambda: compat.count_one_step(NOTHING, [NOTHING]).__enter__()),
    "set_global_step": ("manual_optimization", lambda: compat.set_global_step(NOTHING, 1)),
    "validates_after_this_batch": ("_data_fetcher", lambda: compat.validates_after_this_batch(NOTHING)),
    "forget_logged": ("_results", lambda: compat.forget_logged(NOTHING, "training_step")),
    "is_last_batch": ("batch_progress", lambda: compat.is_last_batch(NOTHING)),
    "is_fitting": ("_trainer", lambda: compat.is_fitting(NOTHING)),
    "share_of_process": ("distributed_sampler_kwargs", lambda: compat.share_of_process(NOTHING)),
    "subcommand_setting": ("_get", lambda: compat.subcommand_setting(NOTHING, "ckpt_path")),
    "has_version": ("_version", lambda: compat.has_version(NOTHING)),
    "set_version": ("_version", lambda: compat.set_version(NOTHING, "version_0")),
    "patched_forward": ("_compiled_call_impl", lambda: compat.patched_forward([NOTHING], id).__enter__()),
}


@pytest.mark.parametrize("function", WITHOUT)
def test_what_a_version_lacks_is_said(function: str) -> None:
    missing, use = WITHOUT[function]
    with pytest.raises(
        LoraGANError, match=rf"Nothing has no {missing} in this version, but lora-gan relies on it; inst"
    ):
        use()


def test_a_logger_that_does_not_follow_is_noticed(tmp_path: Path) -> None:
    class Moved(TensorBoardLogger):
        version = "new"

    with pytest.raises(LoraGANError, match="Moved writes to new and not to the run's folder version_0"):
        compat.set_version(Moved(tmp_path), "version_0")


def test_forward_is_replaced_and_returns() -> None:
    module, hooked = nn.Identity(), nn.Identity()
    hooked.forward = lambda x: x + 1  # type: ignore[method-assign]
    with compat.patched_forward([module, hooked], lambda m: lambda x, inner=m.forward: 10 * inner(x)):
        assert (module(1), hooked(1)) == (10, 20)
    assert (module(1), hooked(1)) == (1, 2)
    assert "forward" not in vars(module)


def test_forward_returns_after_an_error() -> None:
    module = nn.Identity()
    with pytest.raises(KeyError), compat.patched_forward([module], lambda m: {nn.Identity(): id}[m]):
        pass
    with pytest.raises(KeyError), compat.patched_forward([module, module], lambda m: lambda x: x):
        raise KeyError
    assert "forward" not in vars(module)


def test_a_compiled_module_is_refused() -> None:
    module = nn.Identity()
    module.compile()
    with pytest.raises(LoraGANError, match="Identity is compiled; leave out torch"):
        compat.patched_forward([module], lambda m: m.forward).__enter__()


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_precisions_that_would_convert_the_adapters_are_refused(
    precision: Any, build: Build, batch: PromptBatch
) -> None:
    """By every command, whether the precision is a setting or a plugin; the API's trainer is one of these."""
    module, rows = build(), DataLoader([batch], batch_size=None)
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    plugins: Any = [DoublePrecision() if precision == "64-true" else HalfPrecision(precision)]
    for given in ({"precision": precision}, {"plugins": plugins}):
        trainer = L.Trainer(max_steps=1, **given, **quiet)
        for command in (trainer.fit, trainer.validate, trainer.test, trainer.predict):
            with pytest.raises(LoraGANError, match=f"trainer.precision {precision} .*backbone.dtype: bfloat16"):
                command(module, rows)
    with pytest.raises(LoraGANError, match=f"trainer.precision {precision}"):
        Stepper(module, torch.device("cpu"), precision)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert torch.get_default_dtype() == torch.float32


def test_what_learns_is_in_float32_whatever_the_default_dtype_is(build: Build) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = build(advantage=ValueGAE(), model=HiddenStatesDiscriminator(), dtype="bfloat16")
        module.backbone.take_snapshot()
    finally:
        torch.set_default_dtype(torch.float32)
    kept = {name: tensor.dtype for name, tensor in module.state_dict().items() if name in module._kept()}
    assert set(kept.values()) == {torch.float32}
    assert {"generator.value_head.weight", "coefficients.policy", "discriminator.model.head.bias"} <= set(kept)


@pytest.mark.parametrize(
    "lora",
    [
        LoraSettings(4, 8),
        LoraSettings(4, 8, ["q_proj", "embed_tokens"]),
        LoraSettings(4, 8, use_dora=True),
    ],
)
def test_adapters_are_switched_as_by_peft(lora: LoraSettings, bases: dict[str, str]) -> None:
    """With a snapshot, with layers that only one adapter has, and with gradients that stay as they are."""
    torch.manual_seed(0)
    backbone = Backbone(bases["llama"], lora, LoraSettings(2, 4, ["q_proj", "v_proj"]))
    randomise(backbone)
    backbone.take_snapshot()
    for parameter in backbone.parameters_of("generator"):
        torch.nn.init.normal_(parameter, std=0.1)
    layers = [m for m in backbone.lm.modules() if isinstance(m, BaseTunerLayer)]
    learning = [name for name, p in backbone.named_parameters() if p.requires_grad]
    ids = torch.arange(5, 12)[None]
    logits = []
    for adapter in (None, "generator", "discriminator", "snapshot", None):
        compat.switch_adapter(layers, adapter)
        found = backbone.causal_lm(input_ids=ids).logits
        state = [(layer.disable_adapters, layer.active_adapters) for layer in layers]
        assert [name for name, p in backbone.named_parameters() if p.requires_grad] == learning
        for layer in layers:
            layer.enable_adapters(adapter is not None)
            if adapter is not None:
                layer.set_adapter(adapter)
        assert [(layer.disable_adapters, layer.active_adapters) for layer in layers] == state
        assert torch.equal(backbone.causal_lm(input_ids=ids).logits, found)
        backbone._let_both_learn()
        logits.append(found.detach())
    apart = [(x - y).abs().max() for i, x in enumerate(logits[:4]) for y in logits[:i]]
    assert min(apart) > 1e-4 and torch.equal(logits[0], logits[4])


def test_adapters_that_are_switched_otherwise_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(BaseTunerLayer, "_disable_adapters")
    with pytest.raises(LoraGANError, match="BaseTunerLayer has no _disable_adapters in this version"):
        compat.switch_adapter([], None)
