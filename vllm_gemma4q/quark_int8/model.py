"""vLLM's Gemma 4 with one addition: tensors that quantizers lay out otherwise are mended while they stream in.

Only for checkpoints that `config.py` claimed; for all others this is the upstream class. Mended: fused 3-D int8
experts and their scales (split into one tensor an expert), norms rounded to int8 (dequantized), zero points (all
zeros are dropped, anything else is an error).
"""

from collections.abc import Iterable, Iterator

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models import gemma4

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.quark_int8.config import QuarkInt8Config
from vllm_gemma4q.quark_int8.facts import (
    FUSED_SCALE_SUFFIXES,
    SCALE,
    ZERO_POINT,
    fused_expert_part,
    relative_name,
)

Weights = Iterable[tuple[str, torch.Tensor]]


class Gemma4ForCausalLM(gemma4.Gemma4ForCausalLM):
    """Upstream's class; see the module's docstring for what `load_weights` adds."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # A weight and its scale may arrive in different calls: the multimodal wrapper calls once per run of names.
        self._half_norms: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Weights) -> set[str]:
        if isinstance(self.quant_config, QuarkInt8Config) and self.quant_config.facts is not None:
            weights = mend(weights, self.quant_config.facts.int8_norms, self._half_norms)
        return super().load_weights(weights)


def mend(weights: Weights, int8_norms: frozenset[str], half_norms: dict[str, torch.Tensor]) -> Iterator:
    """Stream (name, tensor) pairs in the layout that vLLM loads.

    Args:
        weights: pairs under any root of the language model.
        int8_norms: modules whose weights are int8, relative to that root.
        half_norms: weights and scales of norms whose other half has not arrived; kept between calls.

    Raises:
        InputError: a zero point is not zero.
    """
    for name, tensor in weights:
        module, _, leaf = name.rpartition(".")
        if leaf == ZERO_POINT:
            if tensor.any():
                raise InputError(f"tensor {name}: got zero points other than 0, expected 0 (symmetric weights)")
        elif relative_name(module) in int8_norms and leaf in ("weight", SCALE):
            yield from _norm(module, leaf, tensor, half_norms)
        elif fused_expert_part(name):
            yield from _experts(name, tensor)
        else:
            yield name, tensor


def _norm(module: str, leaf: str, tensor: torch.Tensor, halves: dict[str, torch.Tensor]) -> Iterator:
    other = f"{module}.{SCALE if leaf == 'weight' else 'weight'}"
    if other not in halves:
        halves[f"{module}.{leaf}"] = tensor
        return
    rounded, scale = (tensor, halves.pop(other)) if leaf == "weight" else (halves.pop(other), tensor)
    yield f"{module}.weight", rounded.float() * scale.float().reshape(-1)


def _experts(name: str, tensor: torch.Tensor) -> Iterator:
    """Fused experts: weights [E, N, K] int8 or unquantized, scales [E, N] or [E, N, 1]."""
    part = fused_expert_part(name)
    prefix, _, rest = name.partition(f".experts.{part}")
    prefix += ".experts"
    is_scale = rest in FUSED_SCALE_SUFFIXES
    if not is_scale and tensor.dtype is not torch.int8:
        yield f"{prefix}.{part}", tensor
        return
    leaf = SCALE if is_scale else "weight"
    for expert, rows in enumerate(tensor.reshape(tensor.shape[:2]) if is_scale else tensor):
        if part == "down_proj":
            yield f"{prefix}.{expert}.down_proj.{leaf}", rows
        else:
            gate, up = rows.chunk(2)
            yield f"{prefix}.{expert}.gate_proj.{leaf}", gate
            yield f"{prefix}.{expert}.up_proj.{leaf}", up
