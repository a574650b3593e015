"""Mixtures of several data sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from lora_gan.data.checks import checked
from lora_gan.data.source import Source
from lora_gan.data.splits import digest
from lora_gan.errors import LoraGANError
from lora_gan.types import Example


class Mixture(Source):
    """Examples of several sources in proportions given by weights.

    The source with the fewest examples relative to its weight is used whole; of the others, a part is chosen by hash.
    With ``repeat`` it is the source with the most, and examples of the others come several times: so half of the
    prompts can be the few that have targets.
    """

    def __init__(
        self, sources: list[Source], weights: list[float] | None = None, seed: int = 0, repeat: bool = False
    ) -> None:
        """
        Args:
            sources: The data sets.
            weights: Proportion of each source, in any unit; 0 leaves a source out. By default all examples are used.
            seed: Seed of the choice of examples.
            repeat: Whether examples of small sources come several times; needs weights.

        Raises:
            LoraGANError: There is no source, or the weights do not fit the sources.
        """
        super().__init__()
        if not sources:
            raise LoraGANError(
                "a mixture needs at least one source, got none; set data.init_args.source.init_args.sources"
            )
        if weights is not None and len(weights) != len(sources):
            raise LoraGANError(f"{len(weights)} weights for {len(sources)} sources; give one weight for each source")
        for weight in weights or []:
            if not 0 <= weight < float("inf"):
                raise LoraGANError(f"a weight of a mixture must be >= 0, got {weight}; 0 leaves a source out")
        if weights is not None and not any(weights):
            raise LoraGANError("all weights of the mixture are 0; give at least one source a weight above 0")
        if repeat and weights is None:
            raise LoraGANError("repeat: true needs weights, the proportion of each source, such as [1, 1]")
        self.sources = sources
        self.weights = weights
        self.seed = seed
        self.repeat = repeat

    @property
    def name(self) -> str:
        return "mixture of " + ", ".join(source.name for source in self.sources)

    @property
    def note(self) -> str:
        return "; ".join(source.note for source in self.sources if source.note)

    @property
    def prompt_templates(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(template for source in self.sources for template in source.prompt_templates))

    @property
    def turn_templates(self) -> Mapping[str, str] | None:
        return next((source.turn_templates for source in self.sources if source.turn_templates), None)

    def said(self, template: str) -> str:
        return next(source for source in self.sources if template in source.prompt_templates).said(template)

    def rows(self) -> Iterator[Example]:
        self.forget_counts()
        read = [list(checked(source.rows(), source.name)) for source in self.sources]
        for source, examples, wanted in zip(self.sources, read, self._wanted(read), strict=True):
            for count, total in ((self.dropped, source.dropped), (self.repaired, source.repaired)):
                count.update({f"{source.name}/{reason}": number for reason, number in total.items()})
            self.dropped[f"{source.name}/over_its_weight"] += max(len(examples) - wanted, 0)
            yield from self._part(examples, wanted)

    def _wanted(self, read: list[list[Example]]) -> list[int]:
        """Number of examples to use of each source."""
        if self.weights is None:
            return [len(examples) for examples in read]
        pairs = [(len(examples), weight) for examples, weight in zip(read, self.weights, strict=True)]
        units = [count / weight for count, weight in pairs if weight > 0]
        if self.repeat:
            return [round(max(units) * weight) if count else 0 for count, weight in pairs]
        unit = min(units)
        return [min(count, round(unit * weight)) for count, weight in pairs]

    def _part(self, examples: list[Example], wanted: int) -> list[Example]:
        order = sorted(range(len(examples)), key=lambda i: digest(self.seed, examples[i].group, examples[i].prompt))
        again, rest = divmod(wanted, len(examples)) if examples else (0, 0)
        if again > 1 or (again and rest):  # evaluation keeps one example of an item
            examples = [replace(e, item=e.item or f"{e.prompt}\n{e.target}") for e in examples]
        return examples * again + [examples[i] for i in sorted(order[:rest])]
