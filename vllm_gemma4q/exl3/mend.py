"""Tensors of EXL3 checkpoints, turned into what this plugin's methods load while they stream by.

Packed signs of old files become float16; markers of codebooks, whose presence the headers told, are dropped; trellises
of experts are two-dimensional on the way. One tensor at a time; nothing here needs vLLM.
"""

from collections.abc import Iterable, Iterator

import torch
from gemma4q_kernels.exl3 import unpack_signs

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.exl3.facts import INPUT_SIGNS, MARKERS, OUTPUT_SIGNS, PACKED_SIGNS, TRELLIS, Facts
from vllm_gemma4q.module_headers import is_one_expert, relative_name


def mend(weights: Iterable[tuple[str, torch.Tensor]], facts: Facts) -> Iterator[tuple[str, torch.Tensor]]:
    """Stream (name, tensor) pairs, under any root of the language model, in the layout that is loaded.

    Raises:
        InputError: a scale is not finite.
    """
    for name, tensor in weights:
        module, _, leaf = name.rpartition(".")
        if relative_name(module) not in facts.linears:
            yield name, tensor
        elif leaf in PACKED_SIGNS:
            yield f"{module}.{PACKED_SIGNS[leaf]}", unpack_signs(tensor)
        elif leaf not in MARKERS:
            if leaf in (INPUT_SIGNS, OUTPUT_SIGNS) and not bool(tensor.isfinite().all()):
                raise InputError(f"tensor {name}: got NaN or infinity, expected finite numbers")
            # vLLM 0.31 takes any 3-D tensor for that of all experts; `moe.py` gives the shape back.
            yield name, tensor.flatten(1) if leaf == TRELLIS and is_one_expert(name) else tensor
