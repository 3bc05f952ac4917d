"""Quantize checkpoints with AMD Quark itself; runs in Quark's own environment (`.venv-quark`).

python quark_int8.py [--plain] SRC DST [SRC DST ...]

The scheme is spelled out, as Quark 0.13 offers it under no name. Exclusions and the converters that split
fused experts come from Quark's own Gemma 4 template; `--plain` does without the converters, as every
release before that template did. One process takes many checkpoints: starting Quark costs more than
quantizing a small one.
"""

import argparse
from typing import Any

from quark.torch import LLMTemplate, ModelQuantizer
from quark.torch.quantization.config.config import Int8PerChannelSpec, QConfig, QLayerConfig


def quantize(source: str, target: str, plain: bool) -> None:
    template = LLMTemplate.get("gemma4")
    common: dict[str, Any] = {"symmetric": True, "scale_type": "float", "round_method": "half_even"}
    layer = QLayerConfig(
        weight=Int8PerChannelSpec(ch_axis=0, is_dynamic=False, **common).to_quantization_spec(),
        input_tensors=Int8PerChannelSpec(ch_axis=1, is_dynamic=True, **common).to_quantization_spec(),
    )
    config = QConfig(global_quant_config=layer, exclude=template.exclude_layers_name)
    converters = None if plain else template.f2f_weight_converters
    ModelQuantizer(config).direct_quantize_checkpoint(source, target, device="cpu", weight_converters=converters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plain", action="store_true", help="leave fused experts as they are")
    parser.add_argument("folders", nargs="+", metavar="SRC DST", help="pairs of source and output folder")
    arguments = parser.parse_args()
    if len(arguments.folders) % 2:
        parser.error("folders come in pairs: SRC DST")
    sources, targets = arguments.folders[::2], arguments.folders[1::2]
    for source, target in zip(sources, targets, strict=True):
        quantize(source, target, arguments.plain)


if __name__ == "__main__":
    main()
