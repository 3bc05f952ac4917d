"""What a calibration should find, from the whole model in transformers: hooks on its own modules, sums spelled out."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


@dataclass
class Seen:
    """Rows that entered each linear, over all samples; experts by (module, expert); and by MoE layer what was routed.

    `routed`: by experts module, a list a sample of (probabilities, index, gates, norms, shares), all [T, ..].
    """

    inputs: dict[str, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    experts: dict[tuple[str, int], list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    routed: dict[str, list[tuple[torch.Tensor, ...]]] = field(default_factory=lambda: defaultdict(list))


@torch.no_grad()
def watch(folder: Path, samples: Sequence[Sequence[int]]) -> Seen:
    """Run the samples in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen = Seen()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "vision" not in name:
            module.register_forward_pre_hook(
                lambda module, args, name=name: seen.inputs[name].append(args[0].flatten(0, -2))
            )
        if name.endswith(".experts"):
            _watch_experts(model, name.removesuffix(".experts"), seen)
    for sample in samples:
        model(input_ids=torch.tensor([list(sample)]), use_cache=False)
    return seen


def _watch_experts(model, layer_name: str, seen: Seen) -> None:
    layer = model.get_submodule(layer_name)
    name, experts, now = f"{layer_name}.experts", layer.experts, {}

    def run(module, args):
        hidden, index, gates = args
        norms = torch.zeros(index.shape)
        for token, slot in torch.cartesian_prod(torch.arange(index.shape[0]), torch.arange(index.shape[1])).tolist():
            expert = int(index[token, slot])
            gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
            inner = torch.nn.functional.gelu(gate, approximate="tanh") * up
            seen.experts[f"{name}.gate_up_proj", expert].append(hidden[token])
            seen.experts[f"{name}.down_proj", expert].append(inner)
            norms[token, slot] = (experts.down_proj[expert] @ inner).norm()
        now.update(index=index, gates=gates, norms=norms)

    def finish(module, args, output):
        before, after = now["before"].double(), (now["before"] + output[0]).double()
        cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        parts = (now["probabilities"], now["index"], now["gates"], now["norms"], 1 - cosine)
        seen.routed[name].append(tuple(part.double() if part.is_floating_point() else part for part in parts))

    layer.pre_feedforward_layernorm.register_forward_pre_hook(lambda module, args: now.update(before=args[0][0]))
    layer.router.register_forward_hook(lambda module, args, output: now.update(probabilities=output[0]))
    experts.register_forward_pre_hook(run)
    layer.post_feedforward_layernorm_2.register_forward_hook(finish)
