"""GGUF files for tests: Gemma 4 by shape, sparse (all bytes but the header are a hole) or with random weights.

Metadata is what llama.cpp needs to recognise the architecture; nothing here can be served.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from gemma4q_kernels.ggml import GGMLQuantizationType, tensor_bytes
from gguf import GGUFWriter
from gguf.constants import GGUFValueType

BF16, F32 = GGMLQuantizationType.BF16, GGMLQuantizationType.F32
Shape = tuple[int, ...]
Listed = tuple[str, Shape, GGMLQuantizationType]

REAL_31B = Path(__file__).resolve().parents[3] / "shared" / "data" / "gemma-4-31b" / "gguf_bf16_tensors.map"


def gemma4_metadata(layers: int, hidden: int, feed_forward: int, experts: int = 0) -> dict[str, object]:
    pattern = [layer % 6 != 5 for layer in range(layers)]
    values: dict[str, object] = {
        "block_count": layers, "context_length": 4096, "embedding_length": hidden, "feed_forward_length": feed_forward,
        "attention.head_count": 16, "attention.head_count_kv": [8 if sliding else 2 for sliding in pattern],
        "attention.key_length": 512, "attention.value_length": 512, "attention.key_length_swa": 256,
        "attention.value_length_swa": 256, "attention.sliding_window": 1024,
        "attention.sliding_window_pattern": pattern, "attention.layer_norm_rms_epsilon": 1e-6,
        "embedding_length_per_layer_input": 0, "rope.freq_base_swa": 10000.0, "final_logit_softcapping": 30.0,
    }  # fmt: skip
    if experts:
        values |= {"expert_count": experts, "expert_used_count": min(experts, 8), "expert_feed_forward_length": 704}
    return {f"gemma4.{key}": value for key, value in values.items()}


def moe_26b_a4b(experts: int = 128) -> list[Listed]:
    """Every tensor of the language model of Gemma 4 26B-A4B, or of one pruned to fewer experts."""
    hidden, dense, expert = 2816, 2112, 704
    listed: list[Listed] = [
        ("rope_freqs.weight", (256,), F32),
        ("token_embd.weight", (hidden, 262144), BF16),
        ("output_norm.weight", (hidden,), F32),
    ]
    for layer in range(30):
        sliding = layer % 6 != 5
        query, key, head = (4096, 2048, 256) if sliding else (8192, 1024, 512)
        block: dict[str, Shape] = {
            "attn_q.weight": (hidden, query), "attn_k.weight": (hidden, key), "attn_output.weight": (query, hidden),
            "ffn_gate.weight": (hidden, dense), "ffn_up.weight": (hidden, dense), "ffn_down.weight": (dense, hidden),
            "ffn_gate_up_exps.weight": (hidden, 2 * expert, experts),
            "ffn_down_exps.weight": (expert, hidden, experts), "ffn_gate_inp.weight": (hidden, experts),
            "ffn_gate_inp.scale": (hidden,), "ffn_down_exps.scale": (experts,), "layer_output_scale.weight": (1,),
            "attn_q_norm.weight": (head,), "attn_k_norm.weight": (head,),
        }  # fmt: skip
        if sliding:
            block["attn_v.weight"] = (hidden, key)
        norms = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "pre_ffw_norm_2", "post_ffw_norm_1")
        block |= {f"{norm}.weight": (hidden,) for norm in (*norms, "post_ffw_norm_2")}
        for name, shape in block.items():
            keep = len(shape) == 1 or name == "ffn_gate_inp.weight"
            listed.append((f"blk.{layer}.{name}", shape, F32 if keep else BF16))
    return listed


def small_moe() -> list[Listed]:
    """Two layers with the row lengths of the 26B-A4B and very few rows: every rule applies, a few MB."""
    rows = {"ffn_down_exps": 704, "ffn_down": 2112, "ffn_up": 256, "attn_k": 64, "attn_output": 100}
    listed: list[Listed] = [("token_embd.weight", (256, 96), BF16), ("output_norm.weight", (256,), F32)]
    for layer in range(2):
        for role, row in rows.items():
            shape = (row, 8, 3) if role.endswith("exps") else (row, 8)
            listed.append((f"blk.{layer}.{role}.weight", shape, BF16))
        listed += [
            (f"blk.{layer}.attn_norm.weight", (256,), F32),
            (f"blk.{layer}.ffn_gate_inp.weight", (256, 3), F32),
            (f"blk.{layer}.ffn_down_exps.scale", (3,), F32),
            (f"blk.{layer}.one_row.weight", (256, 1), F32),
        ]
    return listed


def real_31b() -> list[Listed]:
    """The published BF16 GGUF of Gemma 4 31B, as listed by its own map file."""
    listed: list[Listed] = []
    for line in REAL_31B.read_text().splitlines():
        name, *fields = line.split(":")
        values = dict(field.split("=", 1) for field in fields)
        shape = tuple(int(size) for size in values["shape"].strip("()").split(",") if size.strip())
        listed.append((name, shape, GGMLQuantizationType[values["dtype"].upper()]))
    return listed


def write_gguf(
    path: Path,
    tensors: Iterable[Listed],
    metadata: Mapping[str, object] | None = None,
    *,
    random_weights: bool = False,
    alignment: int | None = None,
) -> Path:
    """Write a GGUF with the gguf package; without `random_weights` the data is a hole of the right size."""
    writer = GGUFWriter(path, arch="gemma4")
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, value in (metadata or {}).items():
        _add(writer, key, value)
    listed = list(tensors)
    for name, shape, qtype in listed:
        row_first = tuple(reversed(shape))
        writer.add_tensor_info(name, row_first, np.dtype(np.float32), tensor_bytes(qtype, shape), qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    step = writer.data_alignment
    generator = np.random.default_rng(0)
    file.seek(-(-file.tell() // step) * step)
    for _, shape, qtype in listed:
        n_bytes = tensor_bytes(qtype, shape)
        if random_weights:
            file.write(_weights(generator, shape, qtype))
            n_bytes = 0
        file.seek(-(-(file.tell() + n_bytes) // step) * step)
    file.truncate()
    writer.close()
    return path


def write_split(
    folder: Path, tensors: Iterable[Listed], each: int, metadata: Mapping[str, object] | None = None
) -> list[Path]:
    """Write a model of zeros split into files of `each` tensors, as the gguf package names them."""
    writer = GGUFWriter(folder / "m.gguf", arch="gemma4", split_max_tensors=each)
    for key, value in (metadata or {}).items():
        _add(writer, key, value)
    for name, shape, qtype in tensors:
        rows = tuple(reversed(shape))
        data = np.zeros((*rows[:-1], tensor_bytes(qtype, shape[:1])), np.uint8)
        writer.add_tensor(name, data, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("m-*.gguf"))


def _weights(generator: np.random.Generator, shape: Shape, qtype: GGMLQuantizationType) -> bytes:
    values = generator.standard_normal(np.prod(shape), dtype=np.float32)
    return values.tobytes() if qtype is F32 else (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def _add(writer: GGUFWriter, key: str, value: object) -> None:
    kinds = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
    }
    if isinstance(value, list):
        writer.add_key_value(key, value, GGUFValueType.ARRAY, kinds[type(value[0])])
    else:
        writer.add_key_value(key, value, kinds[type(value)])
