"""Pruned copies of small MoE checkpoints, and what they must answer: the unpruned model with its router masked.

Made with plain torch and the safetensors library, without the code under test.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm_plugin.checkpoints import Tensors, edit

Kept = Sequence[Sequence[int]]

# Of 16 experts in each of three layers, top 4: three counts, and none of them the first so many.
NON_UNIFORM: Kept = ((0, 1, 3, 4, 5, 7, 8, 10, 11, 12, 14, 15), (1, 2, 4, 6, 7, 9, 12, 13, 15), tuple(range(16)))
UNIFORM: Kept = (NON_UNIFORM[0], (0, 1, 2, 4, 6, 7, 8, 9, 11, 12, 13, 15), tuple(range(3, 15)))

_SLICED = re.compile(
    r"\.layers\.(?P<layer>\d+)\.(?:experts\.(?:gate_up_proj|down_proj)|router\.(?:proj\.weight|per_expert_scale))$"
)


def prune(source: Path, target: Path, kept: Kept) -> Path:
    """A copy with only these experts of each layer, in their order."""

    def select(tensors: Tensors) -> Tensors:
        return {name: _selected(name, tensor, kept) for name, tensor in tensors.items()}

    edit(source, target, select)
    counts = [len(experts) for experts in kept]
    config: dict[str, Any] = json.loads((target / "config.json").read_text())
    config["text_config"]["num_experts"] = max(counts)
    if len(set(counts)) > 1:
        config["text_config"]["num_experts_per_layer"] = counts
    (target / "config.json").write_text(json.dumps(config))
    return target


def _selected(name: str, tensor: torch.Tensor, kept: Kept) -> torch.Tensor:
    match = _SLICED.search(name)
    return tensor if match is None else tensor[list(kept[int(match["layer"])])]


def swap_experts(tensors: Tensors, layer: int, first: int, second: int) -> Tensors:
    """Two experts of a layer in each other's place, with the router and its scales as they were."""
    order = {first: second, second: first}
    name = f"model.language_model.layers.{layer}.experts.gate_up_proj"
    experts = [order.get(expert, expert) for expert in range(len(tensors[name]))]
    return tensors | {name: tensors[name][experts]}


def masked_logprobs(source: Path, kept: Kept, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, ...]:
    """What the unpruned model says, in float32, when its routers may not choose the other experts.

    Returns:
        float32 [T - 1, V] a prompt of T tokens, as `engine.Answers` has them.
    """
    import transformers

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = transformers.Gemma4ForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    for layer, experts in zip(model.model.language_model.layers, kept, strict=True):
        mask = torch.full((layer.router.proj.out_features,), -torch.inf)
        mask[list(experts)] = 0
        layer.router.proj.register_forward_hook(lambda _, args, logits, mask=mask: logits + mask)
    with torch.no_grad():
        scores = [model(input_ids=torch.tensor([list(prompt)])).logits[0, :-1] for prompt in prompts]
    torch.set_num_threads(threads)
    return tuple(score.float().log_softmax(dim=-1).numpy() for score in scores)
