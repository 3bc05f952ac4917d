"""Sound checkpoints of every scheme, made from the small trained models, and broken copies of them (`breaks.py`)."""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from doctor.breaks import (
    FULL,
    LAYERS,
    SMALL,
    TOWER,
    configured,
    edited,
    half_listed,
    in_float16,
    leftovers,
    lost,
    of_no_method,
    restored,
    rewritten,
    rounded,
    shifted_index,
    split_list,
    text_of,
    truncated,
    unlisted,
    unlisted_leftovers,
    with_dead_rule,
    with_fewer_layers,
    with_other_storage,
    with_values,
    with_virtual_scale,
    without,
    without_config,
    wrongly_listed,
)
from restore.damage import load, read_config, store, write_config
from safetensors.torch import save_file
from vllm_plugin import checkpoints, exl3_checkpoints
from vllm_plugin import fp8_checkpoints as fp8

from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.quark_int8 import quantize as quark_int8

# E4M3 keeps three bits at any magnitude, so that inputs far below this lose little.
_INPUT_ABSMAX = 50.0


def write_good(folder: Path) -> dict[str, Path]:
    """Every sound checkpoint, by name."""
    good = {f"bf16-{kind}": SMALL / kind for kind in ("dense", "moe")}
    for kind in ("dense", "moe"):
        int8 = folder / f"int8-{kind}"
        assert convert(quark_int8.plan(open_checkpoint(SMALL / kind)), int8, ["test"], lambda _: None)
        ignored = fp8.linears_outside(SMALL / kind)
        inputs = defaultdict(lambda: _INPUT_ABSMAX)
        eight = fp8.quantize(SMALL / kind, folder / f"fp8-{kind}", inputs, ignored)
        packed, dense = exl3_checkpoints.make(SMALL / kind, folder / f"exl3-{kind}", folder / f"dense-of-exl3-{kind}")
        good |= {f"int8-{kind}": int8, f"fp8-{kind}": eight, f"exl3-{kind}": packed, dense.name: dense}
    channels = fp8.variant(good["fp8-dense"], folder / "fp8-channels", fp8.by_channel)
    good["fp8-channels"] = fp8.reconfigured(channels, fp8.compressed_tensors(fp8.linears_outside(SMALL / "dense")))
    good["int8-text"] = checkpoints.text_only(good["int8-dense"], folder / "int8-text")
    good["int8-fused"] = checkpoints.edit(good["int8-moe"], folder / "int8-fused", checkpoints.fuse_experts)
    good["compressed-tower"] = _with_tower(good["int8-dense"], folder / "compressed-tower")
    good["int8-sharded"] = _sharded(good["int8-dense"], folder / "int8-sharded")
    return good


def _with_tower(source: Path, target: Path) -> Path:
    """In llm-compressor's words, which vLLM reads for the vision tower, too: that is quantized as well."""
    shutil.copytree(source, target)
    rounded(TOWER)(target)
    tensors = load(target)
    scales = {name: tensor[:, None] for name, tensor in tensors.items() if name.endswith("weight_scale")}
    store(target, tensors | scales)
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    weights, inputs = {**int8, "strategy": "channel", "dynamic": False}, {**int8, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    ignored = ["lm_head", "model.embed_vision.embedding_projection", "model.vision_tower.patch_embedder.input_proj"]
    quantization = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"g": group},
                    "quantization_status": "compressed", "ignore": ignored}  # fmt: skip
    write_config(target, {**read_config(target), "quantization_config": quantization})
    return target


def _sharded(source: Path, target: Path) -> Path:
    """In two files, with an index."""
    shutil.copytree(source, target)
    tensors = load(target)
    (target / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, target / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


def base_of(name: str) -> Path:
    """The checkpoint that a sound one was made from."""
    return SMALL / ("moe" if name.endswith(("moe", "fused")) else "dense")


@dataclass(frozen=True)
class Broken:
    """One way to break a checkpoint.

    Attributes:
        good: the sound one that it starts from.
        change: breaks a copy of it, in place.
        codes: what the doctor has to find for an engine on a CPU: `code` by engine, with the severity.
    """

    good: str
    change: Callable[[Path], None]
    codes: dict[str, tuple[str, str]]


PLUGIN, STOCK = "vllm", "vllm-stock"
FAILS, WRONG, NOTE = "error", "warning", "note"


def _both(code: str, severity: str) -> dict[str, tuple[str, str]]:
    return {PLUGIN: (code, severity), STOCK: (code, severity)}


TEMPLATE = "chat_template.jinja"
BROKEN: dict[str, Broken] = {
    # Scales and dtypes.
    "int8-no-scale": Broken("int8-dense", without(r"\.0\.mlp\.down_proj\.weight_scale$"),
                            {PLUGIN: ("missing-scale", FAILS), STOCK: ("missing-scale", WRONG)}),
    "fp8-no-input-scale": Broken("fp8-dense", without(r"\.0\.mlp\.down_proj\.input_scale$"),
                                 {PLUGIN: ("missing-scale", FAILS)}),
    "fp8-expert-no-scale": Broken("fp8-moe", without(r"\.0\.experts\.1\.up_proj\.weight_scale$"),
                                  {PLUGIN: ("missing-scale", FAILS)}),
    "int8-tower": Broken("int8-dense", rounded(TOWER), {PLUGIN: ("never-quantized", FAILS)}),
    "int8-router": Broken("int8-moe", rounded(r"router\.proj\.weight$"), _both("never-quantized", FAILS)),
    "int8-embeddings": Broken("int8-dense", rounded(r"embed_tokens\.weight$"), _both("never-quantized", FAILS)),
    "int8-tower-scale": Broken("int8-dense", edited(leftovers), _both("leftover-scale", FAILS)),
    "int8-virtual-scale": Broken("int8-dense", edited(with_virtual_scale), _both("leftover-scale", FAILS)),
    "fp8-tower-scale": Broken("fp8-dense", unlisted_leftovers, {PLUGIN: ("leftover-scale", FAILS)}),
    "fp8-tower-scale-listed": Broken("fp8-dense", edited(leftovers), {PLUGIN: ("leftover-scale", NOTE)}),
    "int8-half-gate-up": Broken("int8-dense", restored(f"{LAYERS}1.mlp.gate_proj"),
                                {PLUGIN: ("fused-disagree", FAILS), STOCK: ("fused-disagree", WRONG)}),
    "int8-no-config": Broken("int8-dense", without_config, _both("no-quantization-config", FAILS)),
    # Lists.
    "int8-glob": Broken("int8-dense", unlisted, {PLUGIN: ("partly-quantized", NOTE), STOCK: ("list-misses", WRONG)}),
    "int8-no-values-listed": Broken("int8-dense", half_listed, {STOCK: ("list-lacks-absent-values", FAILS)}),
    "int8-listed": Broken("int8-dense", wrongly_listed,
                          {PLUGIN: ("list-disagrees", NOTE), STOCK: ("list-covers-quantized", FAILS)}),
    "int8-split-list": Broken("int8-dense", split_list, {STOCK: ("list-splits-fused", FAILS)}),
    "int8-dead-rule": Broken("int8-dense", with_dead_rule, _both("dead-rule", NOTE)),
    # Coverage.
    "int8-bf16-experts": Broken("int8-moe", restored(f"{LAYERS}1.experts."), {PLUGIN: ("experts-unquantized", WRONG)}),
    "int8-bf16-attention": Broken("int8-dense", restored(FULL), {PLUGIN: ("partly-quantized", NOTE)}),
    "int8-nothing": Broken("int8-dense", restored("model."), {PLUGIN: ("nothing-quantized", WRONG)}),
    # Tensors against the configuration.
    "int8-no-linear": Broken("int8-dense", without(r"\.1\.self_attn\.o_proj\."),
                             {PLUGIN: ("missing-tensor", FAILS), STOCK: ("missing-tensor", WRONG)}),
    "bf16-no-norm": Broken("bf16-dense", without(r"\.1\.input_layernorm\.weight$"), _both("missing-tensor", FAILS)),
    "bf16-no-values": Broken("bf16-dense", without(r"\.0\.self_attn\.v_proj\.weight$"), _both("missing-tensor", WRONG)),
    "bf16-no-scalar": Broken("bf16-dense", without(r"layer_scalar$"), _both("missing-tensor", WRONG)),
    "bf16-values": Broken("bf16-dense", edited(with_values), _both("k-eq-v", FAILS)),
    "bf16-layers": Broken("bf16-dense", with_fewer_layers, _both("surplus-tensor", FAILS)),
    "bf16-width": Broken("bf16-dense", configured(intermediate_size=128), _both("shape-mismatch", WRONG)),
    "int8-width": Broken("int8-dense", configured(intermediate_size=128), {PLUGIN: ("shape-mismatch", FAILS)}),
    # Files.
    "int8-no-shard": Broken("int8-sharded", lost("model-00002-of-00002.safetensors"),
                            {PLUGIN: ("missing-shard", FAILS), STOCK: ("missing-shard", WRONG)}),
    "int8-stale-index": Broken("int8-sharded", shifted_index,
                               {PLUGIN: ("stale-index", FAILS), STOCK: ("stale-index", NOTE)}),
    "int8-no-index": Broken("int8-sharded", lost("model.safetensors.index.json"),
                            {PLUGIN: ("no-index", FAILS), STOCK: ("no-index", NOTE)}),
    "int8-truncated": Broken("int8-sharded", truncated, _both("damaged-shard", FAILS)),
    "bf16-pickle": Broken("bf16-dense", text_of("pytorch_model.bin", "no pickle"), _both("pickle-file", NOTE)),
    "bf16-no-tokenizer": Broken("bf16-dense", lost("tokenizer.json"), _both("missing-tokenizer", WRONG)),
    "bf16-no-processor": Broken("bf16-dense", lost("processor_config.json"), _both("missing-processor", WRONG)),
    "bf16-no-generation": Broken("bf16-dense", lost("generation_config.json"),
                                 _both("missing-generation-config", NOTE)),
    "bf16-no-template": Broken("bf16-dense", lost(TEMPLATE), _both("missing-chat-template", WRONG)),
    "bf16-stale-template": Broken("bf16-dense", text_of(TEMPLATE, "<|turn>{{ tools }}"),
                                  _both("stale-chat-template", WRONG)),
    "bf16-stale-processor": Broken("bf16-dense", rewritten("processor_config.json", image_seq_length=280),
                                   _both("stale-processor", WRONG)),
    "bf16-stale-tokenizer": Broken("bf16-dense", rewritten("tokenizer_config.json", padding_side="right"),
                                   _both("stale-tokenizer", WRONG)),
    "bf16-stale-generation": Broken("bf16-dense", rewritten("generation_config.json", eos_token_id=1),
                                    _both("stale-generation-config", WRONG)),
    "bf16-gemma3-template": Broken("bf16-dense", text_of(TEMPLATE, "<start_of_turn>{{ tools }}"),
                                   _both("wrong-chat-template", WRONG)),
    "bf16-bad-template": Broken("bf16-dense", text_of(TEMPLATE, "<|turn>{% if %}"), _both("bad-chat-template", WRONG)),
    "bf16-toolless": Broken("bf16-dense", text_of(TEMPLATE, "<|turn>"), _both("no-tools-in-template", NOTE)),
    # Types and methods.
    "int8-no-method": Broken("int8-dense", of_no_method, _both("unsupported", FAILS)),
    "int8-float16": Broken("int8-dense", in_float16, {PLUGIN: ("float16", FAILS)}),
    "bf16-float16": Broken("bf16-dense", in_float16, _both("float16", WRONG)),
    # EXL3.
    "exl3-no-signs": Broken("exl3-dense", without(r"\.1\.mlp\.down_proj\.svh$"), {PLUGIN: ("refused", FAILS)}),
    "exl3-tower": Broken("exl3-dense", edited(exl3_checkpoints.pack_tower), {PLUGIN: ("never-quantized", FAILS)}),
    "exl3-storage": Broken("exl3-dense", with_other_storage, {PLUGIN: ("storage-disagrees", NOTE)}),
    "exl3-storage-text": Broken("exl3-dense", text_of("quantization_config.json", "[1]"),
                                {PLUGIN: ("storage-unreadable", FAILS)}),
}  # fmt: skip
# What the plugin's findings of these name is an engine's option, a download, or a quantization that takes minutes.
MENDED_ELSEWHERE = frozenset({
    "fp8-no-input-scale", "fp8-expert-no-scale", "int8-glob", "int8-bf16-attention", "bf16-no-norm", "bf16-no-values",
    "bf16-no-scalar", "bf16-values", "bf16-layers", "bf16-width", "int8-width", "int8-no-shard", "int8-truncated",
    "int8-float16", "bf16-float16", "exl3-storage", "exl3-no-signs", "exl3-tower",
})  # fmt: skip
# Sound checkpoints that stock vLLM for CPUs cannot serve.
UNSUPPORTED_BY_STOCK = ("fp8-dense", "fp8-moe", "fp8-channels", "int8-moe", "int8-fused", "exl3-dense", "exl3-moe")


def write_broken(name: str, good: dict[str, Path], folder: Path) -> Path:
    """A broken checkpoint."""
    broken = BROKEN[name]
    target = folder / name
    shutil.copytree(good[broken.good], target, ignore=shutil.ignore_patterns("*manifest*"))
    for path in target.rglob("*"):
        path.chmod(0o644)
    broken.change(target)
    return target
