"""Quantize a checkpoint with AMD Quark itself; runs in Quark's own environment (`.venv-quark`).

python quark_int8.py SRC DST

The scheme is spelled out, as Quark 0.13 offers it under no name. Experts are split by the converters of
Quark's own Gemma 4 template.
"""

import sys

from quark.torch import LLMTemplate, ModelQuantizer
from quark.torch.quantization.config.config import Int8PerChannelSpec, QConfig, QLayerConfig


def main(source: str, target: str) -> None:
    template = LLMTemplate.get("gemma4")
    common = {"symmetric": True, "scale_type": "float", "round_method": "half_even"}
    layer = QLayerConfig(
        weight=Int8PerChannelSpec(ch_axis=0, is_dynamic=False, **common).to_quantization_spec(),
        input_tensors=Int8PerChannelSpec(ch_axis=1, is_dynamic=True, **common).to_quantization_spec(),
    )
    config = QConfig(global_quant_config=layer, exclude=template.exclude_layers_name)
    converters = template.f2f_weight_converters
    ModelQuantizer(config).direct_quantize_checkpoint(source, target, device="cpu", weight_converters=converters)


if __name__ == "__main__":
    main(*sys.argv[1:])
