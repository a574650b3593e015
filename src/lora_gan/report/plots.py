"""Plots of a report: curves of runs over steps, as SVG to stand inside a page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_gan.report.run import Curve, Run, thinned

LINES = ("-", "--", ":", "-.")  # of the runs
POINTS = 500  # of a curve
MOST = 12  # curves of a panel; more cannot be told apart
SETTINGS: dict[Any, Any] = {"svg.fonttype": "none", "text.parse_math": False, "font.size": 8, "path.simplify": True}
OTHER_TEXT = ("length", "perplexity_under_base", "kl_to_base", "entropy_2", "self_bleu", "mmd", "truncated")


@dataclass(frozen=True)
class Panel:
    """A plot: which logged values it shows."""

    title: str
    tags: str  # regular expression of the whole name


PANELS = (
    Panel("Rewards: total and parts", r"reward/(?!adversarial$|win_rate$|frac_reward_zero_std$).*"),
    Panel("Adversarial reward", r"reward/(adversarial|win_rate)"),
    Panel("Losses", r"loss/.*"),
    Panel("Held-out loss (nats a token)", r"validation/loss"),
    Panel("Held-out text metrics", rf"text/(?!({'|'.join(OTHER_TEXT)}|distinct_\d)$).*"),
    Panel("Held-out diversity and truncation", r"text/(distinct_\d|self_bleu|mmd|truncated)"),
    Panel("Discriminator against the length rule", r"(discriminator|preference)/(accuracy|length_accuracy)"),
    Panel("KL to the reference (nats)", r"policy/kl|text/kl_to_base"),
    Panel("Entropy (nats a token)", r"policy/entropy"),
    Panel("Completion length", r"completions/mean_length|text/length"),
    Panel("Signs of collapse", r"collapse/(?!length).*"),
    Panel("Fitness of the population", r"fitness/.*"),
    Panel("Diversity and survival of members", r"population/diversity|survival/.*"),
    Panel("Coefficients that changed or count", r"coefficient/.*"),
    Panel("Learning rates", r"(generator|discriminator)/learning_rate"),
    Panel("Norms of the gradients", r"(generator|discriminator)/grad_norm"),
)


def plots(runs: Sequence[Run]) -> list[str]:
    """An SVG for each panel that a run has values for: a colour for each name, a line style for each run."""
    return [drawn for panel in PANELS if (drawn := draw(panel, runs))]


def draw(panel: Panel, runs: Sequence[Run]) -> str:
    """A panel with the phases of the runs' curricula as vertical lines; empty if no run has values for it."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    tags = sorted({tag for run in runs for tag, curve in run.curves.items() if curve and re.fullmatch(panel.tags, tag)})
    if not tags:
        return ""
    with mpl.rc_context({**SETTINGS, "svg.hashsalt": panel.title}):
        figure = Figure(figsize=(5.2, 3.1), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for number, run in enumerate(runs):
            for place, tag in enumerate(tags[:MOST]):
                curve = thinned(whole(run, tag), max(POINTS // len(runs), 50))
                label = tag if len(runs) == 1 else f"{tag}, {run.name}"
                style: dict[str, Any] = {"ls": LINES[number % len(LINES)], "color": f"C{place % 10}", "lw": 1.1}
                if curve:
                    marker = "." if len(curve) < 30 else ""
                    axes.plot([*curve], [*curve.values()], label=label, marker=marker, ms=4, **style)
            for phase in run.phases:
                axes.axvline(phase.get("start", 0), color="0.6", lw=0.8, ls=LINES[number % len(LINES)], zorder=0)
        left = f" (the first {MOST} of {len(tags)})" if len(tags) > MOST else ""
        axes.set_title(panel.title + left, fontsize=9)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=6, frameon=False, loc="best")
        text = io.StringIO()
        figure.savefig(text, format="svg")
    return inline(text.getvalue())


def whole(run: Run, tag: str) -> Curve:
    """What a run logged under a tag; a coefficient, which is logged when it changes, up to the run's last step."""
    curve = run.curves.get(tag, {})
    return curve | {run.steps: curve[max(curve)]} if curve and tag.startswith("coefficient/") else curve


def inline(svg: str) -> str:
    """An SVG file as an element of a page: without its header, metadata, and the names that all of them share."""
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return re.sub(r'<g id="[^"]*">', "<g>", body)
