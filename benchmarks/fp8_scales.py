"""Which rule should choose FP8 scales? Divergence of the small models when their linears are rounded, in transformers.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/fp8_scales.py

Scales are those that `gemma4q calibrate` and the quantizer would choose, from training text of the small models;
divergence is measured on held-out text: mean KLD in nats over the whole vocabulary from the float32 model, with weights
and inputs of every linear rounded to E4M3 and everything else in float32. "Rounded again" is what stock vLLM does to
linears that it fuses when each has a scale of its own. Results go to benchmarks/results/fp8_scales.json.
"""

import datetime
import json
import math
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import torch
from torch.nn.functional import linear
from transformers import Gemma4ForConditionalGeneration, GemmaTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from small_gemma4 import batches, corpus  # noqa: E402

from vllm_gemma4q.calibration.statistics import read_statistics  # noqa: E402
from vllm_gemma4q.checkpoint import open_checkpoint  # noqa: E402
from vllm_gemma4q.fp8_static.e4m3 import round_trip  # noqa: E402
from vllm_gemma4q.fp8_static.format import MAX  # noqa: E402
from vllm_gemma4q.fp8_static.inputs import input_scales  # noqa: E402
from vllm_gemma4q.fp8_static.quantize import linears_to_quantize  # noqa: E402
from vllm_gemma4q.fp8_static.scales import Rule  # noqa: E402
from vllm_gemma4q.fp8_static.weights import weight_scales  # noqa: E402
from vllm_gemma4q.linears import Linear  # noqa: E402

GEMMA4Q = Path(sys.executable).with_name("gemma4q")
ROW_LENGTH, ROWS, SAMPLES = 192, 16, 12

Round = Callable[[torch.Tensor], torch.Tensor]


class Rounded:
    """A model whose linears round their inputs as `inputs` says, by module; weights are replaced by `set_weights`."""

    def __init__(self, folder: Path) -> None:
        self.model = Gemma4ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.linears = {one.module: one for one in linears_to_quantize(open_checkpoint(folder))}
        self.parameters = dict(self.model.named_parameters())
        self.originals = {name: weight.detach().clone() for name, weight in self._weights()}
        self.inputs: Mapping[str, Round] = {}
        for name, module in self.model.named_modules():
            if name in self.linears:
                module.register_forward_pre_hook(lambda _, given, name=name: (self._input(name, given[0]),))
            elif name.endswith(".experts"):
                module.forward = lambda x, chosen, gates, name=name: self._experts(name, x, chosen, gates)

    def set_weights(self, change: Callable[[Linear, torch.Tensor], torch.Tensor]) -> None:
        for name, weight in self._weights():
            weight.copy_(change(self.linears[name], self.originals[name]))

    def _weights(self) -> list[tuple[str, torch.Tensor]]:
        """By module: rows of parameters, experts one by one."""
        result = []
        for module, one in self.linears.items():
            parameter = self.parameters[one.tensor.name].data
            result.append((module, parameter.view(-1, parameter.shape[-1])[one.first : one.last]))
        return result

    def _input(self, module: str, x: torch.Tensor) -> torch.Tensor:
        return self.inputs[module](x) if module in self.inputs else x

    def _experts(self, name: str, x: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        gate_up, down = self.parameters[f"{name}.gate_up_proj"], self.parameters[f"{name}.down_proj"]
        result = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, rank = torch.where(chosen == expert)
            both = linear(self._input(f"{name}.{expert}.gate_proj", x[token]), gate_up[expert])
            gate, up = both.chunk(2, dim=-1)
            inner = torch.nn.functional.gelu(gate, approximate="tanh") * up
            answer = linear(self._input(f"{name}.{expert}.down_proj", inner), down[expert])
            result.index_add_(0, token, answer * gates[token, rank, None])
        return result

    @torch.no_grad()
    def log_probabilities(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.model(input_ids=ids).logits.log_softmax(-1) for ids in rows.split(4)])


def per_token(x: torch.Tensor) -> torch.Tensor:
    """Dynamic quantization: a scale a token."""
    return round_trip(x, (x.abs().amax(-1, keepdim=True) / MAX).clamp_min(1e-12))


def weight_variants(model: Rounded) -> dict[str, Callable[[Linear, torch.Tensor], torch.Tensor]]:
    linears = model.linears
    own = {module: float(weight.abs().max()) / MAX for module, weight in model.originals.items()}
    largest: dict[str, float] = {}
    for module, one in linears.items():
        largest[one.fused] = max(largest.get(one.fused, 0), own[module])
    variants = {}
    for rule in Rule:
        chosen = weight_scales(linears.values(), rule, lambda _: None)
        variants[rule.value] = lambda one, w, chosen=chosen: round_trip(w, chosen[one.module].scale)
    variants["absmax, own scales, rounded again"] = lambda one, w: round_trip(
        round_trip(w, own[one.module]), largest[one.fused]
    )
    variants["absmax per channel"] = lambda _, w: round_trip(w, w.abs().amax(1, keepdim=True) / MAX)
    return variants


def input_variants(model: Rounded, statistics: Path) -> dict[str, dict[str, Round]]:
    found = read_statistics(statistics)
    variants: dict[str, dict[str, Round]] = {}
    for rule in Rule:
        scales = input_scales(model.linears.values(), found, rule)
        variants[rule.value] = {
            module: lambda x, scale=chosen.scale: round_trip(x, scale) for module, chosen in scales.items()
        }
    variants["dynamic per token"] = dict.fromkeys(model.linears, per_token)
    return variants


def measure(folder: Path, work: Path) -> dict[str, float]:
    """Mean KLD by variant."""
    text, statistics = work / "calibration.txt", work / f"{folder.name}.safetensors"
    text.write_text("\n\n".join(corpus.training_sections()))
    sizes = ["--samples", str(SAMPLES), "--max-length", str(ROW_LENGTH)]
    subprocess.run([GEMMA4Q, "calibrate", folder, statistics, "--text", text, "--raw", *sizes], check=True)
    rows = batches.text_rows(corpus.held_out_sections(), GemmaTokenizer.from_pretrained(folder), ROW_LENGTH)[:ROWS]
    model = Rounded(folder)
    reference = model.log_probabilities(rows)

    def divergence() -> float:
        got = model.log_probabilities(rows)
        return float((reference.exp() * (reference - got)).sum(-1)[:, 1:].mean())

    results = {"nothing": divergence()}
    weights, inputs = weight_variants(model), input_variants(model, statistics)
    for name, change in weights.items():
        model.set_weights(change)
        results[f"weights: {name}"] = divergence()
    model.set_weights(lambda _, weight: weight)
    for name, model.inputs in inputs.items():
        results[f"inputs: {name}"] = divergence()
    for name in ("absmax", "mse"):
        model.set_weights(weights[name])
        model.inputs = inputs[name]
        results[f"both: {name}"] = divergence()
    model.set_weights(weights["absmax"])
    model.inputs = inputs["dynamic per token"]
    results["weights: absmax, inputs: dynamic per token"] = divergence()
    return results


def main() -> None:
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as work:
        for kind in ("dense", "moe"):
            results[kind] = measure(ROOT / "examples" / "small_gemma4" / kind, Path(work))
            assert math.isclose(results[kind]["nothing"], 0, abs_tol=1e-6)
            for name, value in results[kind].items():
                print(f"{kind:6} {name:45} {value:.6f}")
    document = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "vllm-gemma4q")},
        "positions": ROWS * (ROW_LENGTH - 1),
        "calibration": {"samples": SAMPLES, "length": ROW_LENGTH},
        "mean KLD": results,
    }
    (ROOT / "benchmarks" / "results" / "fp8_scales.json").write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
