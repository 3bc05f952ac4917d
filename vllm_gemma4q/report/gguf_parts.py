"""Parts of a GGUF file, from its header alone; types are ggml's, whose bytes hold scales and codes together."""

from collections.abc import Iterator, Mapping

from gemma4q_kernels.ggml import FLOAT_TYPES

from gguf_mixed.tensors import EMBEDDINGS, OUTPUT, Inventory, Tensor
from vllm_gemma4q.architecture import FULL_ATTENTION, MAX_LAYERS, SLIDING_ATTENTION, Role
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.report.parts import Column, Part

_COLUMNS: Mapping[str, Column] = {
    "attn_q": Column.Q, "attn_k": Column.K, "attn_v": Column.V, "attn_output": Column.O,
    "ffn_gate": Column.GATE, "ffn_up": Column.UP, "ffn_down": Column.DOWN,
    "ffn_gate_up_exps": Column.EXPERTS_IN, "ffn_gate_exps": Column.EXPERTS_IN, "ffn_up_exps": Column.EXPERTS_IN,
    "ffn_down_exps": Column.EXPERTS_OUT, "ffn_gate_inp": Column.ROUTER,
    "inp_gate": Column.INPUT_GATE, "proj": Column.INPUT_PROJECTION,
}  # fmt: skip
_ROLES: Mapping[Column, Role] = {
    **dict.fromkeys((Column.Q, Column.K, Column.V, Column.O), Role.ATTENTION),
    **dict.fromkeys((Column.GATE, Column.UP, Column.DOWN), Role.MLP),
    **dict.fromkeys((Column.EXPERTS_IN, Column.EXPERTS_OUT), Role.EXPERTS),
    **dict.fromkeys((Column.INPUT_GATE, Column.INPUT_PROJECTION), Role.PER_LAYER_INPUT),
    Column.ROUTER: Role.ROUTER,
    Column.NORMS: Role.NORM,
    Column.OTHER: Role.OTHER,
}


def gguf_layers(inventory: Inventory) -> int:
    """How many layers the header says there are, or else the tensors' names.

    Raises:
        InputError: a number that no model has: the page would have as many columns.
    """
    key = f"{inventory.architecture}.block_count"
    count = inventory.headers[0].get(key)
    if not isinstance(count, int):
        found = (tensor.layer for tensor in inventory.tensors.values())
        return max((layer + 1 for layer in found if layer is not None and layer < MAX_LAYERS), default=0)
    if not 0 <= count <= MAX_LAYERS:
        raise InputError(f"{inventory.path.name}: {key}: got {count}, expected at most {MAX_LAYERS}")
    return count


def gguf_parts(inventory: Inventory, layers: int) -> Iterator[Part]:
    """Every tensor, in the order of the file; blocks beyond the layers are outside."""
    for tensor in inventory.tensors.values():
        layer = tensor.layer if tensor.layer is not None and tensor.layer < layers else None
        column = None if layer is None else _column(tensor)
        yield Part(
            name=tensor.name,
            role=_outside(tensor) if column is None else _ROLES[column],
            layer=layer,
            column=column,
            dtype=tensor.qtype.name,
            shape=tensor.shape,
            parameters=tensor.n_elements,
            n_bytes=tensor.n_bytes,
            is_quantized=tensor.qtype not in FLOAT_TYPES,
        )


def gguf_layer_types(inventory: Inventory, layers: int) -> tuple[str, ...]:
    """Kind of attention of each layer, empty text where the header does not say."""
    pattern = inventory.headers[0].get(f"{inventory.architecture}.attention.sliding_window_pattern")
    if not isinstance(pattern, tuple) or len(pattern) != layers:
        return ("",) * layers
    return tuple(SLIDING_ATTENTION if sliding else FULL_ATTENTION for sliding in pattern)


def _column(tensor: Tensor) -> Column:
    stem, _, leaf = tensor.role.rpartition(".")
    if stem.endswith("_exps") and leaf == "scale":  # the router's scale of each expert
        return Column.ROUTER
    if stem in _COLUMNS:
        return _COLUMNS[stem]
    return Column.NORMS if len(tensor.shape) == 1 else Column.OTHER


def _outside(tensor: Tensor) -> Role:
    if tensor.name in EMBEDDINGS:
        return Role.EMBEDDING
    if tensor.name == OUTPUT:
        return Role.LM_HEAD
    if tensor.name.startswith("per_layer_model_proj"):
        return Role.PER_LAYER_INPUT
    return Role.NORM if "norm" in tensor.name else Role.OTHER
