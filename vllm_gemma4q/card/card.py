"""The card of one checkpoint, as Markdown with Hugging Face's metadata in front.

    metadata   base model, licence, tags; figures of GSM8K as evaluation results
    what       the scheme in a sentence, experts of a pruned mixture, sizes by role, bits where they differ
    quality    one table a kind of result file, with intervals; no row without a measurement; a picture beside others
    memory     weights and KV cache in vLLM, computed from headers and said so
    serving    the command, where a measurement ran it, with the engine's version
    origin     the command that made it, versions

Source of the metadata's names: Hugging Face's model card specification (`huggingface_hub.ModelCardData`).
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from vllm_gemma4q.card.experts import NOTHING, Experts, Stored, how, pruned_by
from vllm_gemma4q.card.results import Measured, Measurement
from vllm_gemma4q.card.text_table import text_table
from vllm_gemma4q.compare.figures import engine_name
from vllm_gemma4q.vram.engines import VLLM
from vllm_gemma4q.vram.table import Row

SCHEMES = {
    "quark-int8": "W8A8 INT8 in AMD Quark's format: int8 weights with a scale an output channel, activations quantized "
    "to int8 with a scale a token while serving.",
    "fp8-static": "FP8 (E4M3) weights and activations with static scales from calibration.",
    "exl3": "EXL3, ExLlamaV3's trellis format.",
    "prune": "A mixture with fewer experts than the original.",
    "restore": "A quantized checkpoint with what should not have been quantized taken back from the original.",
}
_PRUNE = "prune"
_GB, _GIB = 1e9, 2**30


@dataclass(frozen=True)
class Card:
    """What goes into a card.

    Attributes:
        title: heading.
        manifest: of the checkpoint.
        results: of the checkpoint.
        memory: rows of `vram.table`, by ranks.
        base_model: Hugging Face id of the original; None leaves it out.
        author: who quantized it; None leaves it out.
        licence: Hugging Face's short name; None leaves it out.
        picture: name of the picture that lies beside the card; None where there is none.
        beside: names of the other models in it.
        stored: what the checkpoint's own files say; a manifest knows the last command only.
    """

    title: str
    manifest: Mapping[str, Any]
    results: Measured
    memory: Sequence[Row]
    base_model: str | None = None
    author: str | None = None
    licence: str | None = None
    picture: str | None = None
    beside: Sequence[str] = ()
    stored: Stored = NOTHING

    def markdown(self) -> str:
        """The whole card."""
        sections = [self._front(), f"# {self.title}", *self._what(), *self._quality(), *self._memory()]
        return "\n\n".join([*sections, *self._serving(), *self._origin()]) + "\n"

    @property
    def scheme(self) -> str:
        """The name in the manifest."""
        return str(self.manifest["identity"]["scheme"])

    @property
    def _schemes(self) -> list[str]:
        """The last command's, then what earlier ones left: a pruned INT8 checkpoint is both."""
        pruned = [_PRUNE] if self._experts is not None else []
        quantized = [] if self.stored.scheme is None else [self.stored.scheme]
        return list(dict.fromkeys([self.scheme, *quantized, *pruned]))

    @property
    def _experts(self) -> Experts | None:
        return pruned_by(self.manifest["details"]) if self.scheme == _PRUNE else self.stored.experts

    def _front(self) -> str:
        from huggingface_hub import EvalResult, ModelCardData

        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type="openai/gsm8k",
                dataset_name="GSM8K",
                metric_type="accuracy",
                metric_name=f"accuracy, {found['run']['prompt']['shots']}-shot, strict",
                metric_value=found["strict"]["accuracy"],
            )
            for found in self.results.gsm8k
            if found["strict"]["accuracy"] is not None
        ]
        quantized = self._schemes != [_PRUNE]
        data = ModelCardData(
            base_model=self.base_model,
            base_model_relation=None if self.base_model is None else ("quantized" if quantized else "finetune"),
            quantized_by=self.author,
            license=self.licence,
            tags=["gemma4", "vllm", "vllm-gemma4q", *self._schemes],
            model_name=self.title if results else None,
            eval_results=results or None,
        )
        return f"---\n{data.to_yaml()}\n---"

    def _what(self) -> Iterator[str]:
        of = "" if self.base_model is None else f"Of [{self.base_model}](https://huggingface.co/{self.base_model}). "
        yield of + " ".join(SCHEMES[scheme] for scheme in self._schemes)
        if experts := self._experts:
            chosen = how(self.manifest["details"]) if self.scheme == _PRUNE else ()
            yield " ".join([experts.sentence, *chosen])
        if self.scheme == _PRUNE and self.stored.scheme is not None:
            yield "Parameters count scales."
        yield (_pruned_sizes if self.scheme == _PRUNE else _sizes)(self.manifest["summary"])
        if bits := self.manifest.get("details", {}).get("bits"):
            yield _table(
                ("quantized linears", "bits: how many", "bits a weight, all included", "NMSE"),
                [
                    (role, ", ".join(f"{k}: {n}" for k, n in row["linears"].items()), row["bpw"], f"{row['nmse']:.2e}")
                    for role, row in bits.items()
                ],
            )

    def _quality(self) -> Iterator[str]:
        if not self.results.text and not self.results.gsm8k:
            return
        yield "## Quality"
        for measured in self.results.text:
            yield f"{_conditions(measured)}:"
            yield _text_table(measured)
        for found in self.results.gsm8k:
            yield f"GSM8K, {found['run']['questions']['count']:,} questions over the chat API of `vllm serve`:"
            yield _gsm8k_table(found)
        if self.picture is not None:
            yield f"Beside {', '.join(self.beside)}, on the same text:"
            yield f"![Divergence and perplexity against bits a weight and GPU memory]({self.picture})"

    def _memory(self) -> Iterator[str]:
        if not self.memory:
            return
        contexts = list(self.memory[0].caches)
        yield "## Memory"
        yield "GiB on each GPU for one request of so many tokens, weights and KV cache, computed from the headers. "\
            "Activations, CUDA graphs and workspace come on top and are not measured."  # fmt: skip
        rows = [
            (row.engine, row.kv_dtype, *(f"{row.total(tokens) / _GIB:.2f}" for tokens in contexts))
            for row in self.memory
        ]
        yield _table(("engine", "KV cache", *(f"{tokens:,}" for tokens in contexts)), rows)

    def _serving(self) -> Iterator[str]:
        commands = list(dict.fromkeys(self._tried()))
        if commands:
            yield "## Serve"
            yield "```\npip install vllm-gemma4q\n" + "\n".join(commands) + "\n```"

    def _tried(self) -> Iterator[str]:
        """What measurements have run, each with the version it ran on."""
        for measured in self.results.text:
            engine, ranks = measured.engine, measured.protocol.get("tensor_parallel_size", 1)
            if engine["name"] != VLLM:
                continue
            dtype = measured.protocol.get("dtype", "auto")
            flags = [] if ranks == 1 else ["-tp", str(ranks)]
            flags += [] if dtype == "auto" else ["--dtype", dtype]
            yield f"{shlex.join(['vllm', 'serve', self.title, *flags])}   # vLLM {engine['version']}"
        for found in self.results.gsm8k:
            if "serve_flags" in found["run"]:
                yield shlex.join(["vllm", "serve", self.title, *found["run"]["serve_flags"]])

    def _origin(self) -> Iterator[str]:
        command = shlex.join(_without_folders(argument) for argument in self.manifest["command"])
        versions = ", ".join(f"{name} {version}" for name, version in self.manifest["versions"].items())
        yield "## Origin"
        yield f"```\n{command}\n```"
        yield f"With {versions}. `gemma4q-manifest.json` holds SHA-256 of all files, before and after."


def _conditions(measured: Measurement) -> str:
    protocol = measured.protocol
    texts = ", ".join(text["name"] for text in protocol["texts"])
    return (
        f"{texts}, windows of {protocol['context']} tokens, {engine_name(measured.engine)}, "
        f"dtype {protocol.get('dtype', 'auto')}, tensor parallel {protocol.get('tensor_parallel_size', 1)}"
    )


def _text_table(measured: Measurement) -> str:
    headings, rows = text_table(measured)
    return _table(("text as", *headings), [(framing, *cells) for framing, cells in rows.items()])


def _gsm8k_table(found: Mapping[str, Any]) -> str:
    rows = []
    for parse in ("strict", "flexible"):
        score = found[parse]
        if score["accuracy"] is None:  # no question had a reply
            continue
        low, high = score["interval"]
        counts = (score[key] for key in ("truncated", "empty", "error"))
        rows.append((parse, f"{score['accuracy']:.2%}", f"{low:.2%} to {high:.2%}", *counts))
    return _table(("answers", "accuracy", "95% interval", "truncated", "empty", "errors"), rows)


def _sizes(summary: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [(role, f"{row['parameters']:,}", _share(row), *_bytes(row)) for role, row in summary.items()]
    return _table(("part", "parameters", "quantized", "GB before", "GB now"), rows)


def _pruned_sizes(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Pruning changes parameters and quantizes none."""
    rows = [
        (role, *(f"{row[f'parameters_{when}']:,}" for when in ("before", "after")), *_bytes(row))
        for role, row in summary.items()
    ]
    return _table(("part", "parameters before", "parameters now", "GB before", "GB now"), rows)


def _bytes(row: Mapping[str, Any]) -> tuple[str, str]:
    return _gb(row["bytes_before"]), _gb(row["bytes_after"])


def _share(row: Mapping[str, Any]) -> str:
    return f"{row['quantized'] / row['parameters']:.0%}" if row["parameters"] else ""


def _gb(size: int) -> str:
    return f"{size / _GB:.3f}"


def _without_folders(argument: str) -> str:
    """Arguments that are paths by their names alone: folders of a machine are nobody's business."""
    return PurePath(argument).name if "/" in argument else argument


def _table(headings: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
