"""An Ollama Modelfile for a Gemma 4 GGUF.

With RENDERER set, Ollama ignores TEMPLATE. `gemma4` stands for `gemma4-small` or `gemma4-large`, by the model's name or
by whether it has 12B parameters or more; a pruned large model below that would silently be rendered as a small one, so
there the renderer is named. The small models proper (E2B, E4B) are those with embeddings in every layer.
"""

from gguf_mixed.errors import InputError
from gguf_mixed.tensors import Inventory

LARGE_FROM = 12_000_000_000
MAX_CONTEXT = 256_000
_PARAMETERS = (("temperature", "0.6"), ("top_p", "0.95"), ("repeat_penalty", "1.15"), ("repeat_last_n", "256"))
_STOPS = ("<turn|>", "<|tool_response>")


def renderer(inventory: Inventory) -> str:
    """The RENDERER that fits the model.

    Raises:
        InputError: not a Gemma 4.
    """
    if inventory.architecture != "gemma4":
        raise InputError(f"{inventory.path.name}: architecture is {inventory.architecture}, expected gemma4")
    small = bool(inventory.headers[0].get("gemma4.embedding_length_per_layer_input"))
    return "gemma4-large" if inventory.n_elements < LARGE_FROM and not small else "gemma4"


def modelfile(inventory: Inventory) -> str:
    """The Modelfile's text; it lies beside the model, whose context length caps `num_ctx`.

    Raises:
        InputError: not a Gemma 4, or split, which Ollama does not read.
    """
    if len(inventory.headers) > 1:
        raise InputError(
            f"{inventory.path.name}: split into {len(inventory.headers)} files, which Ollama does not read"
        )
    context = inventory.headers[0].get("gemma4.context_length")
    parameters = [
        *_PARAMETERS,
        ("num_ctx", str(min(MAX_CONTEXT, context) if isinstance(context, int) else MAX_CONTEXT)),
    ]
    parameters += [("stop", f'"{stop}"') for stop in _STOPS]
    lines = [f"FROM ./{inventory.path.name}", f"RENDERER {renderer(inventory)}", "PARSER gemma4"]
    return "\n".join([*lines, *(f"PARAMETER {name} {value}" for name, value in parameters)]) + "\n"
