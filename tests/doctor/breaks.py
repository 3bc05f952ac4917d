"""Ways to break a checkpoint, or to have it as careless tools leave it: each changes a folder in place.

Edits go through the safetensors library and plain JSON, not the code under test.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from restore.damage import change_quantization, load, read_config, store, to_int8, write_config
from vllm_plugin import checkpoints
from vllm_plugin import fp8_checkpoints as fp8

SMALL = Path(__file__).resolve().parents[2] / "examples" / "small_gemma4"
LAYERS = "model.language_model.layers."
FULL = f"{LAYERS}2.self_attn."  # values that are the keys
TOWER = r"vision_tower.*proj\.linear\.weight$"


def edited(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    """A break that changes tensors."""
    return lambda folder: store(folder, change(load(folder)))


def without(pattern: str) -> Callable[[Path], None]:
    """A break that loses tensors."""

    def drop(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept = {name: tensor for name, tensor in tensors.items() if not re.search(pattern, name)}
        assert len(kept) < len(tensors)
        return kept

    return edited(drop)


def restored(prefix: str) -> Callable[[Path], None]:
    """A break that has modules of the language model unquantized."""

    def change(folder: Path) -> None:
        kind = "moe" if any(".experts." in name for name in load(folder)) else "dense"
        store(folder, checkpoints.unquantize(load(folder), load(SMALL / kind), prefix))

    return change


def rounded(pattern: str) -> Callable[[Path], None]:
    """A break that quantizes what should not be."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = [name for name in tensors if re.search(pattern, name) and tensors[name].dim() == 2]
        assert names
        for name in names:
            tensors[name], tensors[f"{name}_scale"] = to_int8(tensors[name])
        return tensors

    return edited(change)


def lost(*names: str) -> Callable[[Path], None]:
    """A break that loses files."""

    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def configured(**text: Any) -> Callable[[Path], None]:
    """A break that changes the text configuration."""

    def change(folder: Path) -> None:
        config = read_config(folder)
        write_config(folder, {**config, "text_config": {**config["text_config"], **text}})

    return change


def unlisted(folder: Path) -> None:
    """The full layer's attention unquantized, and listed by a glob."""
    restored(FULL)(folder)
    exclude = read_config(folder)["quantization_config"]["exclude"]
    change_quantization(folder, exclude=[*exclude, f"*{FULL}*"])


def half_listed(folder: Path) -> None:
    """The same, listed by the names of tensors that exist."""
    restored(FULL)(folder)
    exclude = read_config(folder)["quantization_config"]["exclude"]
    change_quantization(folder, exclude=[*exclude, *(f"{FULL}{name}_proj" for name in "qko")])


def wrongly_listed(folder: Path) -> None:
    """int8 weights on the list."""
    exclude = read_config(folder)["quantization_config"]["exclude"]
    change_quantization(folder, exclude=[*exclude, f"{LAYERS}0.mlp.down_proj"])


def split_list(folder: Path) -> None:
    """One shard of a fused linear on the list."""
    exclude = read_config(folder)["quantization_config"]["exclude"]
    change_quantization(folder, exclude=[*exclude, f"{LAYERS}0.mlp.up_proj"])


def of_no_method(folder: Path) -> None:
    """A method that no version of vLLM has."""
    change_quantization(folder, quant_method="foo")


def with_dead_rule(folder: Path) -> None:
    """A rule with a typing error."""
    exclude = read_config(folder)["quantization_config"]["exclude"]
    change_quantization(folder, exclude=[*exclude, "model.vision_towr"])


def shifted_index(folder: Path) -> None:
    """A tensor that the index has in the other file."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    name = f"{LAYERS}0.mlp.down_proj.weight"
    index["weight_map"][name] = files[index["weight_map"][name] == files[0]]
    path.write_text(json.dumps(index))


def truncated(folder: Path) -> None:
    """A file of which the end is missing."""
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1000])


def in_float16(folder: Path) -> None:
    config = read_config(folder)
    config["text_config"]["dtype"] = "float16"
    write_config(folder, {**config, "dtype": "float16"})


def with_fewer_layers(folder: Path) -> None:
    types = read_config(folder)["text_config"]["layer_types"]
    configured(num_hidden_layers=len(types) - 1, layer_types=types[1:])(folder)


def with_values(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {f"{FULL}v_proj.weight": tensors[f"{FULL}k_proj.weight"].clone()}


def with_virtual_scale(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {f"{FULL}v_proj.weight_scale": tensors[f"{FULL}k_proj.weight_scale"].clone()}


def without_config(folder: Path) -> None:
    config = read_config(folder)
    del config["quantization_config"]
    write_config(folder, config)


def with_other_storage(folder: Path) -> None:
    path = folder / "quantization_config.json"
    content = json.loads(path.read_text())
    entry = next(iter(content["tensor_storage"].values()))["stored_tensors"]
    next(iter(entry.values()))["shape"] = [1, 2, 3]
    path.write_text(json.dumps(content))


def text_of(name: str, text: str) -> Callable[[Path], None]:
    """A break that replaces a file."""
    return lambda folder: (folder / name).write_text(text) and None


def rewritten(name: str, **changes: Any) -> Callable[[Path], None]:
    """A break that changes keys of a JSON file."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def leftovers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Both scales beside every linear of the tower, which is not quantized."""
    return fp8.leave_scales(tensors, TOWER)


def unlisted_leftovers(folder: Path) -> None:
    """Scales beside a tower that is not quantized, and not on the list."""
    edited(leftovers)(folder)
    change_quantization(folder, ignored_layers=["lm_head"])
