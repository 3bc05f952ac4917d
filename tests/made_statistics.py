"""Statistics files as a calibration would write them, for synthetic checkpoints: every linear gets random inputs."""

import json
from pathlib import Path

import numpy as np

from vllm_gemma4q.architecture import is_fused_experts, is_linear_weight, parse_text_architecture
from vllm_gemma4q.calibration.identity import model_identity
from vllm_gemma4q.calibration.statistics import N_BINS, Inputs, as_arrays, histogram_edges, write_statistics
from vllm_gemma4q.checkpoint import open_checkpoint

SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


def observe(values):
    """Inputs of one linear. values: one float array [tokens, in] a matrix, with no tokens where nothing came."""
    edges = histogram_edges()
    channels = values[0].shape[1]
    absmax = [np.abs(rows).max(axis=0, initial=0) if len(rows) else np.zeros(channels) for rows in values]
    histogram = [
        np.bincount(np.searchsorted(edges, np.abs(rows).ravel(), side="right"), minlength=N_BINS) for rows in values
    ]
    return Inputs(
        np.array(absmax, np.float32),
        np.array([rows.sum(axis=0) for rows in values]),
        np.array([np.square(rows).sum(axis=0) for rows in values]),
        np.array([len(rows) for rows in values]),
        np.array(histogram),
    )


def random_inputs(shape, seed, unreached=()):
    """[matrices, out, in] -> 32 tokens a matrix, of another size each; none for matrices in `unreached`."""
    rng = np.random.default_rng(seed)
    matrices = shape[0] if len(shape) == 3 else 1
    return [
        rng.standard_normal((0 if index in unreached else 32, shape[-1])).astype(np.float32) * (1 + index)
        for index in range(matrices)
    ]


def write_for(folder: Path, path: Path, unreached=(), change=lambda module, values: values) -> dict[str, Inputs]:
    """A statistics file for a checkpoint folder.

    Args:
        unreached: indices of experts that no token reached.
        change: from a module and its values to the values to be counted.

    Returns:
        Inputs by the file's module names.
    """
    architecture = parse_text_architecture(json.loads((folder / "config.json").read_text()))
    arrays, stored_as, found = {}, {}, {}
    shapes = [(name, shape) for name, shape in architecture.shapes() if is_linear_weight(name, shape)]
    for seed, (name, shape) in enumerate(shapes):
        module = name if is_fused_experts(name) else name.removesuffix(".weight")
        parent, _, last = module.rpartition(".")
        stored_as[module] = f"{parent}.{SHARED.get(last, last)}"
        if last in SHARED:
            found[module] = found[stored_as[module]]
            continue
        found[module] = observe(change(module, random_inputs(shape, seed, unreached if len(shape) == 3 else ())))
        arrays |= as_arrays(module, found[module])
    write_statistics(
        path, arrays, stored_as, {"samples": 1, "tokens": 32, "model": model_identity(open_checkpoint(folder))}
    )
    return found
