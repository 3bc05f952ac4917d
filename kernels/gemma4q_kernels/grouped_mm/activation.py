"""Activations of a gated expert."""

import torch

ACTIVATIONS = ("gelu_tanh", "silu")


def activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    """`gate` through the activation named, in its own dtype.

    Raises:
        ValueError: a name that is not in `ACTIVATIONS`.
    """
    if activation == "gelu_tanh":
        return torch.nn.functional.gelu(gate, approximate="tanh")
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    raise ValueError(f"activation: got {activation!r}, expected one of {list(ACTIVATIONS)}")
