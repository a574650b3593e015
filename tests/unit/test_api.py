"""LoraGAN and GPT2Twin: each ``step`` does the same as a step of a fit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_gan
from lora_gan import GPT2Twin, LoraGAN, LoraGANModule
from lora_gan.advantages import LeaveOneOut, MovingAverage
from lora_gan.backbone import DISCRIMINATOR, GENERATOR, LoraSettings
from lora_gan.callbacks import MovingAverageBaseline
from lora_gan.coefficients import Coefficients
from lora_gan.discriminator import AdapterDiscriminator, ClosenessBCE, ClosenessRegression, DiscriminatorSettings
from lora_gan.errors import LoraGANError
from lora_gan.generator import GeneratorSettings
from lora_gan.optimization import OptimizationSettings
from lora_gan.rewards import FunctionReward
from lora_gan.sampling import Sampling
from lora_gan.types import Example
from tests.helpers.steps import Recorder, half, moved, share_of_a, state, trainer

SMALL: dict[str, Any] = {
    "sampling": Sampling(max_new_tokens=5),
    "generator": GeneratorSettings(lora=LoraSettings(4, 8)),
    "discriminator": DiscriminatorSettings(lora=LoraSettings(4, 8)),
    "device": "cpu",
    "seed": 3,
}
MICRO_BATCHES = OptimizationSettings(micro_batch_size=1)
PROMPTS = ["Say a", "Q: hello?", "2+2="]
TARGETS = ["a", "hi", "4"]


@pytest.fixture
def gan(bases: dict[str, str], tmp_path: Path) -> Callable[..., LoraGAN]:
    def make(**settings: Any) -> LoraGAN:
        given = {"compute_reward": share_of_a, "checkpoints": tmp_path, **SMALL, **settings}
        return LoraGAN(bases["gpt2"], **given)

    return make


@pytest.fixture
def twin(bases: dict[str, str], tmp_path: Path) -> Callable[..., GPT2Twin]:
    return lambda **settings: GPT2Twin(bases["gpt2"], **{"checkpoints": tmp_path, **SMALL, **settings})


def test_the_package_imports_lazily() -> None:
    code = "import sys, lora_gan; print('torch' in sys.modules, *lora_gan.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", *lora_gan.__all__]
    assert {"LoraGAN", "GPT2Twin"} <= set(lora_gan.__all__)
    public = [name for name in lora_gan.__all__ if name != "__version__"]
    assert all(getattr(lora_gan, name).__name__ == name for name in public)
    assert (Path(lora_gan.__file__).parent / "py.typed").exists()
    with pytest.raises(AttributeError, match="no_such_name"):
        lora_gan.no_such_name  # noqa: B018


def test_a_step_reports_six_values(gan: Callable[..., LoraGAN]) -> None:
    out = gan().step(prompt="Say a", target_text="a", train_gen=True, train_disc=True)
    assert set(out) == {"prompt", "response", "true_reward", "disc_loss", "pred_reward", "gen_loss"}
    assert out["prompt"] == "Say a" and isinstance(out["response"], str)
    assert out["true_reward"] == pytest.approx(share_of_a(out["response"], "a"))
    assert all(isinstance(out[name], float) for name in ("true_reward", "disc_loss", "pred_reward", "gen_loss"))


def test_lists_are_batches(gan: Callable[..., LoraGAN]) -> None:
    out = gan().step(PROMPTS, TARGETS)
    assert [len(out[name]) for name in ("prompt", "response", "true_reward", "pred_reward")] == [3, 3, 3, 3]
    several = gan(num_generations=2).step(PROMPTS, TARGETS)
    assert [len(completions) for completions in several["response"]] == [2, 2, 2]
    assert len(gan(num_generations=2).step("Say a", "a")["response"]) == 2
    with pytest.raises(LoraGANError, match="got 3 prompts and 1 targets"):
        gan().step(PROMPTS, "a")


@pytest.mark.parametrize(
    ("settings", "callbacks"),
    [
        ({}, []),
        (
            {"num_generations": 2, "advantage": LeaveOneOut(), "optimization": MICRO_BATCHES},
            [],
        ),
        (
            {"advantage": MovingAverage(), "coefficients": Coefficients(adversarial=0.1, kl=0.1)},
            [MovingAverageBaseline],
        ),
    ],
    ids=["default", "micro-batches", "callback"],
)
def test_steps_equal_steps_of_a_fit(
    settings: dict[str, Any], callbacks: list[Any], gan: Callable[..., LoraGAN]
) -> None:
    """Four steps change the weights bit for bit as a fit of four steps does."""
    watched = Recorder()
    stepped = gan(callbacks=[watched, *(make() for make in callbacks)], **settings)
    batches = []
    for texts in ((PROMPTS, TARGETS), (["Say a"], ["a"]), (PROMPTS[1:], TARGETS[1:]), (PROMPTS, TARGETS)):
        stepped.step(*texts)
        batches.append(stepped._batch(*texts))

    fitted, recorder = gan(callbacks=[make() for make in callbacks], **settings).module, Recorder()
    before = state(fitted)
    loader = DataLoader(batches, batch_size=None, generator=torch.Generator())
    trainer(4, recorder, *(make() for make in callbacks)).fit(fitted, loader)
    assert recorder.reports == watched.reports
    assert not moved(state(fitted), state(stepped.module))
    assert moved(before, state(fitted))
    assert stepped.trainer.global_step == 4


def test_a_role_that_does_not_train_keeps_its_weights(gan: Callable[..., LoraGAN]) -> None:
    for train_gen, train_disc in ((True, False), (False, True), (False, False)):
        one = gan()
        before = state(one.module)
        out = one.step(PROMPTS, TARGETS, train_gen, train_disc)
        changed = moved(before, state(one.module))
        assert any(f".{GENERATOR}." in name for name in changed) is train_gen
        assert any(f".{DISCRIMINATOR}." in name for name in changed) is train_disc
        assert (out["gen_loss"] is not None) is train_gen
        assert len(out["pred_reward"]) == 3


def test_what_a_step_does_not_compute_is_none(gan: Callable[..., LoraGAN]) -> None:
    """Supervised learning alone samples nothing; without a discriminator nothing is predicted."""
    out = gan(coefficients=Coefficients(discriminator_updates=0, policy=0.0)).step("Say a", "a")
    assert (out["response"], out["true_reward"], out["pred_reward"], out["disc_loss"]) == (None,) * 4
    assert out["gen_loss"] > 0
    off = Coefficients(discriminator_updates=0)
    out = gan(coefficients=off, num_generations=2, advantage=LeaveOneOut()).step(PROMPTS, TARGETS)
    assert out["pred_reward"] == [None] * 3 and [len(row) for row in out["true_reward"]] == [2, 2, 2]


def test_the_reward_can_be_replaced(gan: Callable[..., LoraGAN], bases: dict[str, str]) -> None:
    one = gan(compute_reward=lambda response, target: 0.25)
    assert one.step("Say a", "a")["true_reward"] == 0.25
    one.compute_reward = lambda response, target: float(target == "a")  # type: ignore[method-assign]
    assert one.step(PROMPTS, TARGETS)["true_reward"] == [1.0, 0.0, 0.0]

    class Mine(LoraGAN):
        def compute_reward(self, response: str, target: str) -> float:
            return 0.5

    assert Mine(bases["gpt2"], **SMALL).step("Say a", "a")["true_reward"] == 0.5
    fixed = gan(rewards=[FunctionReward(share_of_a)])
    assert fixed.module.rewards[0].name == "share_of_a"


def test_by_default_the_reward_is_the_cosine(bases: dict[str, str]) -> None:
    one = LoraGAN(bases["gpt2"], **SMALL)
    out = one.step(PROMPTS, TARGETS)
    singly = [one.compute_reward(response, target) for response, target in zip(out["response"], TARGETS, strict=True)]
    assert out["true_reward"] == pytest.approx(singly, abs=1e-5)


def test_a_loaded_checkpoint_continues_exactly(
    gan: Callable[..., LoraGAN], tmp_path: Path, bases: dict[str, str]
) -> None:
    """Three steps, then three more in another object from the checkpoint, equal six."""
    settings: dict[str, Any] = {"advantage": MovingAverage(), "optimization": MICRO_BATCHES}
    one = gan(callbacks=[MovingAverageBaseline()], **settings)
    for _ in range(3):
        one.step(PROMPTS, TARGETS)
    folder = one.save_checkpoint(step=100)
    wanted = [one.step(PROMPTS, TARGETS) for _ in range(3)]
    other = gan(callbacks=[MovingAverageBaseline()], **{**settings, "seed": 8})
    other.load_checkpoint(step=100)
    assert other.trainer.global_step == 3
    assert other.module.optimization.updates == {GENERATOR: 3, DISCRIMINATOR: 3}
    assert [other.step(PROMPTS, TARGETS) for _ in range(3)] == wanted
    assert not moved(state(one.module), state(other.module))

    other.load_checkpoint(step=100)
    assert folder == tmp_path / "step-100"
    for role in (GENERATOR, DISCRIMINATOR):
        files = {path.name for path in (folder / role).iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= files
        plain = AutoModelForCausalLM.from_pretrained(bases["gpt2"])
        adapted = PeftModel.from_pretrained(plain, str(folder / role))
        ids = torch.tensor([[72, 101]])
        with torch.no_grad(), other.module.backbone._mode(role):
            wanted_logits = other.module.backbone.causal_lm(input_ids=ids).logits
            torch.testing.assert_close(adapted(input_ids=ids).logits, wanted_logits, atol=1e-5, rtol=0)
    old = torch.load(folder / "state.pt", weights_only=True)
    del old["version"]
    other.save_checkpoint(step=8)
    torch.save(old, tmp_path / "step-8" / "state.pt")
    before = state(other.module)
    with pytest.raises(LoraGANError, match=r"step-8 has format version below 5, this lora-gan reads 7"):
        other.load_checkpoint(step=8)
    assert not moved(before, state(other.module))
    with pytest.raises(LoraGANError, match=r"no checkpoint .*step-7; available: step-100, step-8"):
        other.load_checkpoint(step=7)
    with pytest.raises(LoraGANError, match=r"rank 4.* 2.*generator.lora\.rank"):
        gan(generator=GeneratorSettings(lora=LoraSettings(2, 8))).load_checkpoint(step=100)


def test_a_checkpoint_in_16_mixed_holds_the_scale(gan: Callable[..., LoraGAN]) -> None:
    """Three steps, then one more in another object, are four; the tensors in its files are for any device."""
    one, other = (gan(precision="bf16-mixed") for _ in range(2))
    for gan_, plugin in ((one, half(growth_interval=1, init_scale=4.0)), (other, half())):
        gan_.trainer.strategy.precision_plugin = plugin
    for _ in range(3):
        one.step(PROMPTS, TARGETS)
    one.save_checkpoint(step=3)
    other.load_checkpoint(step=3)
    assert other.step(PROMPTS, TARGETS) == one.step(PROMPTS, TARGETS)
    states = [gan_.trainer.precision_plugin.state_dict() for gan_ in (one, other)]
    assert states[0] == states[1] and states[0]["scale"] > 4.0
    plain = gan()
    plain.load_checkpoint(step=3)
    assert plain.step(PROMPTS, TARGETS)["gen_loss"] is not None


def test_checkpoints_of_a_gpu_are_read_on_a_cpu(gan: Callable[..., LoraGAN], monkeypatch: pytest.MonkeyPatch) -> None:
    one, load, places = gan(), torch.load, list[Any]()
    one.step(PROMPTS, TARGETS)
    one.save_checkpoint(step=1)
    monkeypatch.setattr("torch.load", lambda *a, **how: places.append(how.get("map_location")) or load(*a, **how))
    one.load_checkpoint(step=1)
    assert len(places) >= 4 and set(places) == {"cpu"}


def test_the_generator_learns_its_targets(gan: Callable[..., LoraGAN]) -> None:
    one = gan(coefficients=Coefficients(policy=0.0, adversarial=0.1))
    for group in one.trainer.optimizers[0].param_groups:
        group["lr"] = 1e-2
    for _ in range(25):
        out = one.step(PROMPTS, TARGETS, train_disc=False)
    assert one.generate(PROMPTS) == TARGETS and one.generate("Say a") == "a"
    assert out["gen_loss"] < 1


def test_a_step_of_the_twin_reports_four_values(twin: Callable[..., GPT2Twin]) -> None:
    stats = twin().step(prompt="The capital of France is", target_text="Paris", target_label=1)
    assert set(stats) == {"loss_gen", "loss_disc", "gen_text", "prob_close"}
    assert stats["gen_text"].startswith("The capital of France is")
    assert 0 < stats["prob_close"] < 1 and stats["loss_gen"] > 0 and stats["loss_disc"] > 0


def test_the_twin_learns_the_given_label(twin: Callable[..., GPT2Twin]) -> None:
    for label in (0, 1):
        one = twin()
        for group in one.trainer.optimizers[1].param_groups:
            group["lr"] = 1e-2
        found = [one.step(PROMPTS, TARGETS, [label] * 3)["prob_close"] for _ in range(20)]
        assert all(abs(p - label) < 0.3 for p in found[-1]), (label, found[-1])
    with pytest.raises(LoraGANError, match="target_label must be from 0 to 1, one for each prompt"):
        twin().step("Say a", "a", 2)
    with pytest.raises(LoraGANError, match="target_label"):
        twin().step(PROMPTS, TARGETS, [1])


def test_without_a_label_similarity_decides(twin: Callable[..., GPT2Twin]) -> None:
    recorder = Recorder()
    twin(callbacks=[recorder]).step(PROMPTS, TARGETS)
    scores = recorder.outputs[-1].scores
    assert scores is not None and scores.total.shape == (3,)


def test_the_twins_loss_is_supervised_plus_coupled(twin: Callable[..., GPT2Twin]) -> None:
    recorder = Recorder()
    one = twin(coupling=0.5, callbacks=[recorder])
    out = one.step(PROMPTS, TARGETS, 1)
    report = recorder.reports[-1]
    assert out["loss_gen"] == pytest.approx(report["loss/supervised"] + 0.5 * report["loss/coupled"], abs=1e-6)


def test_settings_reach_the_module(gan: Callable[..., LoraGAN]) -> None:
    one = gan(coefficients=Coefficients(supervised=0.25), precision="bf16-mixed")
    assert isinstance(one.module, LoraGANModule)
    assert one.module.coefficients.supervised == 0.25
    assert one.step("Say a", "a")["gen_loss"] is not None
    with pytest.raises(TypeError, match="no_such_setting"):
        gan(no_such_setting=1)


def test_the_twin_keeps_its_defaults_beside_given_settings(twin: Callable[..., GPT2Twin]) -> None:
    model = twin(coupling=0.25, coefficients=Coefficients(supervised=0.5)).module
    assert isinstance(model.discriminator.model, AdapterDiscriminator)
    assert isinstance(model.discriminator.objective, ClosenessBCE)
    assert (model.coefficients.coupled, model.coefficients.supervised) == (0.25, 0.5)
    one = twin(discriminator=DiscriminatorSettings(objective=ClosenessRegression(), lora=LoraSettings(4, 8)))
    assert isinstance(one.module.discriminator.objective, ClosenessRegression)
    assert 0 < one.step("Say a", "a", 1)["prob_close"] < 1


# model objects, data sets, chat, export

ROWS = [{"prompt": f"Say {letter}", "completion": letter} for letter in "abcdef"]
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_model_object_is_the_base_of_its_folder(bases: dict[str, str], gan: Callable[..., LoraGAN]) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(bases["gpt2"]), AutoTokenizer.from_pretrained(bases["gpt2"])
    settings: dict[str, Any] = {"compute_reward": share_of_a, **SMALL}
    given, named = LoraGAN(model, tokenizer=tokenizer, **settings), gan()
    for one in (given, named):
        one.step(PROMPTS, TARGETS)
    assert not moved(state(given.module), state(named.module))
    with pytest.raises(LoraGANError, match="needs its tokenizer"):
        LoraGAN(model, **settings)


def test_fit_trains_on_rows_in_memory_and_on_a_file(gan: Callable[..., LoraGAN], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    on_rows, on_file = gan(), gan()
    before = state(on_rows.module)
    metrics = on_rows.fit(ROWS, steps=4, batch_size=3)
    assert len(metrics) == 4 and all("loss/generator" in step for step in metrics)
    assert moved(before, state(on_rows.module))
    on_file.fit(str(file), steps=4, batch_size=3)
    assert not moved(state(on_rows.module), state(on_file.module))


@pytest.mark.parametrize("merge", [False, True])
def test_export_is_the_generator_and_training_continues(
    gan: Callable[..., LoraGAN], bases: dict[str, str], tmp_path: Path, merge: bool
) -> None:
    trained = gan()
    trained.fit(ROWS, steps=2, batch_size=3)
    folder = trained.export(tmp_path / "out", merge=merge)
    plain = AutoModelForCausalLM.from_pretrained(folder if merge else bases["gpt2"])
    plain = (plain if merge else PeftModel.from_pretrained(plain, str(folder))).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with trained.module.backbone.generator(), torch.no_grad():
        wanted = trained.module.backbone.causal_lm(ids).logits
        torch.testing.assert_close(plain(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    trained.fit(ROWS, steps=1)


def test_a_system_message_without_chat_is_refused() -> None:
    with pytest.raises(LoraGANError, match="is written by a chat template only: give chat=True"):
        LoraGAN("builtin", system="Be brief.")


def test_chat_writes_prompts_with_the_template(bases: dict[str, str]) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(bases["gpt2"]), AutoTokenizer.from_pretrained(bases["gpt2"])
    tokenizer.chat_template = CHAT_TEMPLATE
    gan = LoraGAN(model, share_of_a, tokenizer=tokenizer, chat=True, system="Be brief.", **SMALL)
    batch = gan._batch(["Hi"], ["a"])
    assert tokenizer.decode(batch.prompt_ids[0]) == "[system]Be brief.<|endoftext|>[user]Hi<|endoftext|>[assistant]"
    assert tokenizer.decode(batch.target_ids[0]) == "a<|endoftext|>"
    assert isinstance(gan.step("Hi", "a")["response"], str)
    said = gan.generate([{"role": "user", "content": "Hi"}])
    assert said == gan.generate("Hi") and isinstance(said, str)
    with pytest.raises(LoraGANError, match="the last message must be the user's"):
        gan.generate([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}])


def test_fit_takes_examples_and_a_table_of_pandas(gan: Callable[..., LoraGAN]) -> None:
    on_rows, on_table, on_examples = gan(), gan(), gan()
    on_rows.fit(ROWS, steps=2, batch_size=3)
    on_table.fit(pandas.DataFrame([*ROWS, {"prompt": "Say g"}])[: len(ROWS)], steps=2, batch_size=3)  # type: ignore[arg-type]
    assert not moved(state(on_rows.module), state(on_table.module))
    (metrics,) = on_examples.fit([Example("Say a", " a"), Example("Say b", " b")], steps=1)
    assert "loss/supervised" in metrics
    with pytest.raises(LoraGANError, match="row 2: the field 'completion' is null"):
        gan().fit(pandas.DataFrame([*ROWS[:1], {"prompt": "Say g"}]), steps=1)  # type: ignore[arg-type]


TEXTS = "must be a text or a list of texts, got"


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda gan: gan.fit(["a", "b"], 1), "row 1 is str, not a dictionary"),
        (
            lambda gan: gan.fit({"prompt": ["a"], "completion": ["b"]}, 1),
            "rows of columns by datasets.Dataset.from_dict",
        ),
        (lambda gan: gan.fit(None, 1), "rows are a list of dictionaries, got NoneType"),
        (lambda gan: gan.fit(ROWS, -1), "steps must be a whole number from 0, got -1"),
        (lambda gan: gan.fit(ROWS, 1.5), "steps must be a whole number from 0, got 1.5"),
        (lambda gan: gan.step("hello", None), f"target_text {TEXTS} NoneType"),
        (lambda gan: gan.step(["hello"], [None]), f"target_text {TEXTS} a list with NoneType"),
        (lambda gan: gan.step(3, "x"), f"prompt {TEXTS} int"),
        (lambda gan: gan.generate(None), f"prompt {TEXTS} NoneType"),
        (lambda gan: gan.generate({"role": "user", "content": "hi"}), f"prompt {TEXTS} dict"),
        (lambda gan: gan.generate([{"role": "user", "content": "hi"}]), "give chat=True to the model, or a text"),
        (lambda gan: gan.generate([{"role": "user"}]), "holds null, not text"),
        (lambda gan: gan.save_checkpoint(-1), "step must be a whole number from 0, got -1"),
    ],
)
def test_mistakes_of_a_caller_are_named(use: Callable[[Any], Any], message: str, gan: Callable[..., LoraGAN]) -> None:
    with pytest.raises(LoraGANError, match=message):
        use(gan())


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5])
def test_a_seed_that_numpy_does_not_take_is_refused(seed: Any) -> None:
    with pytest.raises(LoraGANError, match="seed must be a whole number from 0 to 4294967295, got"):
        LoraGAN("builtin", seed=seed)
