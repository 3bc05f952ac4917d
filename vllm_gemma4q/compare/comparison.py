"""Models beside each other: what the table, the picture, the JSON and a model card are made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vllm_gemma4q.compare.figures import (
    Gsm8kGroup,
    TextGroup,
    gsm8k_groups,
    report_gsm8k,
    report_text,
    text_groups,
)
from vllm_gemma4q.compare.model import Model, describe_experts, model_report, open_models
from vllm_gemma4q.compare.plot import drawable, plot
from vllm_gemma4q.compare.provenance import describe_origins
from vllm_gemma4q.compare.results import Results, read_results
from vllm_gemma4q.vram.table import contexts_of

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class Comparison:
    """Models of one base and all that was measured of them.

    Attributes:
        schemes: of each model, with its experts where models differ in them.
        tokens: the context that memory is for.
        origins: what the user should know of where they come from.
    """

    models: Sequence[Model]
    schemes: Sequence[str]
    tokens: int
    text: Sequence[TextGroup]
    gsm8k: Sequence[Gsm8kGroup]
    origins: Sequence[str]

    def report(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "context": self.tokens,
            "models": [model_report(model, self.tokens) for model in self.models],
            "text": [report_text(group, self.models) for group in self.text],
            "gsm8k": [report_gsm8k(group, self.models) for group in self.gsm8k],
            "origins": list(self.origins),
        }

    def drawable(self) -> list[TextGroup]:
        """Groups with a point to draw."""
        return [group for group in self.text if drawable(group, self.models)]

    def drawable_beside(self, model: Model) -> list[TextGroup]:
        """Groups with a point for a model and for another."""
        shown = ((group, drawable(group, self.models)) for group in self.text)
        return [group for group, models in shown if model in models and len(models) > 1]

    def shown_in(self, groups: Sequence[TextGroup]) -> list[Model]:
        """Models with a point in some group, or a line as the original."""
        return [
            model
            for model in self.models
            if any(group.is_reference(model) or model in drawable(group, self.models) for group in groups)
        ]

    def plot(self, groups: Sequence[TextGroup], target: Path | BinaryIO) -> None:
        """Write the picture of groups with points.

        Raises:
            InputError: the file cannot be written.
        """
        plot(groups, self.models, self.schemes, self.tokens, target)


def compare(paths: Sequence[Path], results: Sequence[Path], context: str | None) -> Comparison:
    """Open models, read results and match them.

    Args:
        context: tokens of the request that memory is for, such as `4K`; by default that, or the models' longest.

    Raises:
        InputError: see `open_models`, `read_results`, `text_groups` and `gsm8k_groups`; a context that is none.
    """
    models = open_models(paths)
    found = read_results(results, [model.identity for model in models], "one of these models")
    return of_models(models, found, context)


def of_models(models: Sequence[Model], results: Sequence[Results], context: str | None) -> Comparison:
    """Match results to models."""
    longest = min(model.source.longest for model in models)
    tokens = contexts_of(context or str(min(longest, DEFAULT_CONTEXT)), longest)[0]
    return Comparison(
        models,
        describe_experts(models),
        tokens,
        text_groups(models, results),
        gsm8k_groups(results),
        describe_origins(models),
    )
