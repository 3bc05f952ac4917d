"""What a recipe gets and what it returns. A recipe is a function; it chooses types and never touches files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gguf_mixed.errors import InputError
from gguf_mixed.imatrix import Imatrix
from gguf_mixed.imatrix_gguf import read_imatrix
from gguf_mixed.tensors import EMBEDDINGS, OUTPUT, Inventory, RequestedTypes, Tensor, read_inventory


@dataclass(frozen=True)
class Material:
    """What a recipe may look at.

    Attributes:
        imatrix, imatrix_path: the importance matrix, where one was given.
        llama_cpp: the folder to look for llama.cpp's programs in, None for PATH and the cache.
    """

    inventory: Inventory
    imatrix: Imatrix | None = None
    imatrix_path: Path | None = None
    llama_cpp: Path | None = None

    @classmethod
    def read(cls, model: Path, imatrix: Path | None = None, llama_cpp: Path | None = None) -> "Material":
        """Read a model's header and an imatrix, and check that they belong together.

        Raises:
            InputError: see `read_inventory`, `read_imatrix` and `Imatrix.matches`.
        """
        inventory = read_inventory(model)
        loaded = None if imatrix is None else read_imatrix(imatrix)
        if loaded is not None:
            loaded.matches(inventory)
        return cls(inventory, loaded, imatrix, llama_cpp)

    def require_imatrix(self, recipe: str) -> Imatrix:
        """The imatrix.

        Raises:
            InputError: there is none.
        """
        if self.imatrix is None:
            raise InputError(f"recipe {recipe}: needs an importance matrix: --imatrix FILE")
        return self.imatrix


@dataclass(frozen=True)
class Choice:
    """Requested types of all quantizable tensors.

    Attributes:
        details: what the sidecar should say of how they came about.
        errors: what each tensor is expected to lose, in the sensitivity's unit; empty for fixed rules.
    """

    types: RequestedTypes
    details: Mapping[str, object] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)


Recipe = Callable[[Material], Choice]


def quantizable(inventory: Inventory) -> list[Tensor]:
    """The tensors that a recipe has to give a type, in file order."""
    return [tensor for tensor in inventory.tensors.values() if not tensor.kept_because]


def is_embedding(tensor: Tensor) -> bool:
    """Whether it is an embedding table or the output, which most recipes treat alike."""
    return tensor.name in EMBEDDINGS or tensor.name == OUTPUT


def is_attention(tensor: Tensor) -> bool:
    """Whether it is one of a block's attention projections."""
    return tensor.layer is not None and tensor.role.startswith("attn_")


def is_feed_forward(tensor: Tensor) -> bool:
    """Whether it is one of a block's feed-forward matrices, experts included."""
    return tensor.layer is not None and tensor.role.startswith("ffn_")
