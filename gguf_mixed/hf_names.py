"""GGUF's names for the tensors of Hugging Face checkpoints, by the gguf package's own table."""

import re

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

from gguf_mixed.errors import InputError

GEMMA4 = "gemma4"
_MAX_DIGITS = 3


class HfNames:
    """The table of one architecture, `general.architecture` in a GGUF.

    Raises:
        InputError: the gguf package has none.
    """

    def __init__(self, architecture: str, n_layers: int):
        known = {name: found for found, name in MODEL_ARCH_NAMES.items()}
        found: MODEL_ARCH | None = known.get(architecture)
        if found is None:
            raise InputError(f"architecture {architecture} has no table of names")
        self._names = get_tensor_name_map(found, n_layers)

    def gguf(self, name: str) -> str | None:
        """The GGUF tensor of a parameter, with or without `.weight`; None where it has none."""
        plain = re.sub(r"\.language_model\.", ".", name).removesuffix(".weight")
        found = self._names.get_name(plain)
        return None if found is None else f"{found}.weight"


def n_layers_of(names: "list[str] | tuple[str, ...]") -> int:
    """Layers that checkpoint names speak of.

    Raises:
        InputError: more than any model has, for which a table would be made.
    """
    found = [match[1] for name in names if (match := re.search(r"\.layers\.([0-9]+)\.", name))]
    if long := [number for number in found if len(number) > _MAX_DIGITS]:
        raise InputError(f"layer {long[0]}: expected a number of at most {_MAX_DIGITS} digits")
    return max(map(int, found), default=-1) + 1
