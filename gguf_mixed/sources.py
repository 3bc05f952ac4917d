"""Where the sensitivity of a plan comes from: by name, or by the kind of file."""

from pathlib import Path

from gguf_mixed.errors import InputError
from gguf_mixed.fisher import fisher_sensitivity, read_fisher
from gguf_mixed.sensitivity import Sensitivity, measured_table, role_prior, uniform
from gguf_mixed.tensors import Inventory

ROLE_PRIOR = "role-prior"
NONE = "none"


def find_sensitivity(source: str, inventory: Inventory, force: bool = False) -> Sensitivity:
    """The sensitivity that `source` names.

    Args:
        source: a Fisher file (.safetensors), measured divergences (.csv), `role-prior` or `none`.
        force: take measured divergences whose noise is unknown or too near their signal.

    Raises:
        InputError: neither a name nor such a file, or see the readers.
    """
    if source == ROLE_PRIOR:
        return role_prior(inventory)
    if source == NONE:
        return uniform()
    path = Path(source)
    if path.suffix == ".safetensors":
        return fisher_sensitivity(read_fisher(path))
    if path.suffix == ".csv":
        return measured_table(path, force)
    raise InputError(
        f"sensitivity {source}: expected a Fisher file (.safetensors), divergences (.csv), {ROLE_PRIOR} or {NONE}"
    )
