"""Small mixtures with everything that has an expert axis, and drop maps; used by several test files."""

import json

import numpy as np
from gguf_files import gemma4_metadata, write_gguf
from quantize_runs import T

EXPERTS, LAYERS = 6, 2
DROPPED = {0: [0, 3], 1: [4, 5]}
KEPT = {0: [1, 2, 4, 5], 1: [0, 1, 2, 3]}
SLICED = ("_exps.weight", "_exps.scale", "ffn_gate_inp.weight")


def listed(experts=EXPERTS, row=256, split_gate=False):
    """Rows that K-quants fit, in an order that is nobody's, an odd number of bytes before some tensors."""
    found = [("output_norm.weight", (5,), T.F32)]
    for layer in reversed(range(LAYERS)):
        fused = {"ffn_gate_up_exps.weight": (row, 8, experts)}
        apart = {"ffn_gate_exps.weight": (row, 4, experts), "ffn_up_exps.weight": (row, 4, experts)}
        block = (apart if split_gate else fused) | {
            "ffn_down_exps.weight": (row, 7, experts), "ffn_gate_inp.weight": (row, experts),
            "ffn_gate_inp.scale": (row,), "ffn_down_exps.scale": (experts,), "attn_q.weight": (row, 3),
        }  # fmt: skip
        for name, shape in block.items():
            kept = len(shape) == 1 or name == "ffn_gate_inp.weight"
            found.append((f"blk.{layer}.{name}", shape, T.F32 if kept else T.BF16))
    return [*found, ("token_embd.weight", (row, 9), T.BF16)]


def metadata(experts=EXPERTS):
    changed = {"gemma4.expert_used_count": 3, "general.name": "a\0b", "tokenizer.ggml.tokens": ["x", "\0y", "é"]}
    return gemma4_metadata(LAYERS, 256, 256, experts) | changed


def model(folder, name="model.gguf", alignment=None, **options):
    return write_gguf(folder / name, listed(**options), metadata(), random_weights=True, alignment=alignment)


def drop_map(folder, dropped=DROPPED, layers=LAYERS):
    path = folder / "drop.json"
    path.write_text(json.dumps({str(layer): dropped.get(layer, []) for layer in range(layers)}))
    return path


def expected_data(item, kept=KEPT, num_experts=EXPERTS):
    """Bytes of a tensor of GGUFReader after pruning, from its array: the expert is the slowest axis."""
    data = np.asarray(item.data)
    if not item.name.endswith(SLICED):
        return data.tobytes()
    layer = int(item.name.split(".")[1])
    assert data.shape[0] == num_experts
    return data[kept[layer]].tobytes()
