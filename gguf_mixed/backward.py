"""Computing Fisher marginals: a few backward passes of the model in transformers, labels drawn from the model itself.

Each pass runs one sample of text and differentiates the summed log-probability of one label a position, drawn from
the model's own prediction there. Given the text these gradients are independent with mean zero, so the square of
their sum estimates the sum of squares. Squared gradients are reduced to row and column sums as soon as a tensor has its
gradient, so that one tensor's gradient is all that is held beside the model and its activations.

Not done: models larger than memory (the whole model is loaded), padding (samples run one by one).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from gguf_mixed.errors import InputError
from gguf_mixed.fisher import Fisher, Marginals
from gguf_mixed.hf_names import HfNames
from gguf_mixed.rows import read_rows
from gguf_mixed.tensors import Inventory, Tensor

_COMPARED_ROWS = 4
_ROWS_AT_ONCE = 64
# Rounding to BF16 moves a weight by up to 1/256 of itself.
_SAME_WITHIN = 1 / 128


@dataclass(frozen=True)
class Model:
    """A model in transformers beside the GGUF that was made of it: `parameters` by GGUF tensor name."""

    module: Any
    tokenizer: Any
    parameters: Mapping[str, torch.nn.Parameter]


def load(inventory: Inventory, checkpoint: Path | None = None, dtype: torch.dtype = torch.float32) -> Model:
    """Load a model for `accumulate`.

    Args:
        inventory: of the GGUF whose tensors the marginals are for.
        checkpoint: the Hugging Face folder that the GGUF was made of; None loads the GGUF itself, which transformers
            can for some architectures.
        dtype: to compute in.

    Raises:
        InputError: transformers is missing or cannot load it, a quantizable tensor has no counterpart, or one differs
            from it.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise InputError("transformers: not installed: pip install 'vllm-gemma4q[fisher]'") from error
    folder = checkpoint if checkpoint is not None else inventory.path.parent
    options = {} if checkpoint is not None else {"gguf_file": inventory.path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
        module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False, **options)
    except Exception as error:  # transformers and its readers raise whatever they meet
        what = checkpoint.name if checkpoint is not None else f"{inventory.path.name}, try --checkpoint FOLDER"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"transformers cannot load {what}: {reason}") from error
    module.eval().requires_grad_(False)
    parameters = _by_gguf_name(inventory, module)
    for name, parameter in parameters.items():
        _check_same(inventory.tensors[name], parameter)
    return Model(module, tokenizer, parameters)


def accumulate(
    model: Model, samples: Sequence[Sequence[int]], seed: int = 0, progress: bool = False
) -> tuple[dict[str, Marginals], int]:
    """Marginals of every parameter, summed over the samples, and the number of positions.

    Args:
        samples: token ids, one list a pass.
        seed: of the labels' draw.
        progress: show a bar on the error stream.
    """
    sums = {name: MarginalSums(parameter.shape) for name, parameter in model.parameters.items()}
    handles = [
        parameter.requires_grad_(True).register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            sums[name].take
        )
        for name, parameter in model.parameters.items()
    ]
    generator = torch.Generator().manual_seed(seed)
    try:
        for sample in tqdm(samples, unit="pass", desc="Fisher", disable=not progress):
            ids = torch.tensor([list(sample)], device=next(model.module.parameters()).device)
            logits = model.module(input_ids=ids, use_cache=False).logits[0]
            logits.backward(_gradient(logits.detach(), generator))
    finally:
        for handle in handles:
            handle.remove()
        model.module.requires_grad_(False)
    return {name: found.marginals() for name, found in sums.items()}, sum(map(len, samples))


def compute_fisher(
    model: Model,
    samples: Sequence[Sequence[int]],
    details: Mapping[str, object],
    seed: int = 0,
    progress: bool = False,
) -> Fisher:
    """`accumulate` as the content of a Fisher file."""
    marginals, positions = accumulate(model, samples, seed, progress)
    return Fisher(marginals, positions, {**details, "passes": len(samples), "seed": seed})


class MarginalSums:
    """Row and column sums of one tensor's squared gradients.

    Args:
        shape: [matrices, rows, columns], or [rows, columns].
    """

    def __init__(self, shape: Sequence[int]) -> None:
        matrices, rows, columns = (1, *shape)[-3:]
        self._rows = torch.zeros((matrices, rows), dtype=torch.float64)
        self._columns = torch.zeros((matrices, columns), dtype=torch.float64)

    def add(self, gradient: torch.Tensor, matrix: int = 0, row: int = 0) -> None:
        """Add the gradient of one pass, or of some matrices and rows of it, from the first on."""
        gradient = _as_matrices(gradient)
        matrices, rows = slice(matrix, matrix + len(gradient)), slice(row, row + gradient.shape[1])
        for sums, over in ((self._rows[matrices, rows], 2), (self._columns[matrices], 1)):
            # A norm squared: the squares themselves would take as much memory as the gradient.
            sums += torch.linalg.vector_norm(gradient, dim=over, dtype=torch.float32).cpu().double().square()

    def take(self, parameter: torch.Tensor, matrix: int = 0) -> None:
        """Add a parameter's gradient and drop it: for a hook that runs when it is there."""
        assert parameter.grad is not None
        self.add(parameter.grad, matrix)
        parameter.grad = None

    def state(self) -> dict[str, Any]:
        """The sums so far, float64 arrays, for `restore`."""
        return {"rows": self._rows.numpy(), "columns": self._columns.numpy()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with sums that `state` gave."""
        self._rows, self._columns = torch.from_numpy(state["rows"]), torch.from_numpy(state["columns"])

    def marginals(self) -> Marginals:
        return Marginals(self._rows.float().numpy(), self._columns.float().numpy())


def draw_points(n: int, generator: torch.Generator) -> torch.Tensor:
    """Where in the running sum of its probabilities each of `n` labels lies: float64 [n, 1] in [0, 1).

    Drawn on the CPU, so that every device draws alike.
    """
    return torch.rand(n, 1, generator=generator, dtype=torch.float64)


def _gradient(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Of -log p(label) by the logits, [positions, vocabulary], for one drawn label a position: p less one at the label.

    Labels are found where the running sum of p passes the drawn points.
    """
    points = draw_points(len(logits), generator).to(logits.device)
    gradient = logits.float().softmax(-1)
    for start in range(0, len(logits), _ROWS_AT_ONCE):
        rows = gradient[start : start + _ROWS_AT_ONCE]
        sums = rows.cumsum(-1, dtype=torch.float64)
        labels = torch.searchsorted(sums, points[start : start + _ROWS_AT_ONCE] * sums[:, -1:], right=True)
        rows.scatter_add_(1, labels.clamp_(max=rows.shape[1] - 1), -torch.ones_like(labels, dtype=rows.dtype))
    return gradient.to(logits.dtype)


def _as_matrices(values: torch.Tensor) -> torch.Tensor:
    return values if values.ndim == 3 else values[None]


def _by_gguf_name(inventory: Inventory, module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters of the quantizable tensors, by GGUF name."""
    found: dict[str, torch.nn.Parameter] = {}
    for gguf_name, parameter in _named(inventory, module):
        found.setdefault(gguf_name, parameter)
    wanted = [tensor for tensor in inventory.tensors.values() if not tensor.kept_because]
    for tensor in wanted:
        if tensor.name not in found:
            raise InputError(f"tensor {tensor.name}: no counterpart in the checkpoint")
        expected = (tensor.n_matrices, tensor.n_elements // tensor.row_length // tensor.n_matrices, tensor.row_length)
        shape = tuple(_as_matrices(found[tensor.name]).shape)
        if shape != expected:
            raise InputError(f"tensor {tensor.name}: got {list(shape)} in the checkpoint, expected {list(expected)}")
    return {tensor.name: found[tensor.name] for tensor in wanted}


def _named(inventory: Inventory, module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    layers = [tensor.layer for tensor in inventory.tensors.values() if tensor.layer is not None]
    names = HfNames(inventory.architecture, max(layers, default=0) + 1)
    for name, parameter in module.named_parameters():
        gguf_name = names.gguf(name)
        if gguf_name is not None:
            yield gguf_name, parameter


def _check_same(tensor: Tensor, parameter: torch.nn.Parameter) -> None:
    """Raise unless the two hold the same weights: names that match may still be permuted, or of another model."""
    n_rows = tensor.n_elements // tensor.row_length
    rows = np.unique(np.linspace(0, n_rows - 1, min(_COMPARED_ROWS, n_rows)).astype(np.int64))
    ours = parameter.detach().reshape(n_rows, tensor.row_length)[torch.from_numpy(rows)].float().cpu().numpy()
    theirs = read_rows(tensor, rows)
    if not float(np.linalg.norm(ours - theirs)) <= _SAME_WITHIN * float(np.linalg.norm(theirs)):
        raise InputError(f"tensor {tensor.name}: the checkpoint's weights differ from those of the GGUF")
