"""The streamed backward pass: the marginals of the diagonal Fisher information of models larger than memory.

What `gguf_mixed.backward` computes with the whole model, here with one layer of it: the output layer first (see
`output_layer`), then the layers from the last to the first, each loaded, run again on what entered it in the forward
pass, and differentiated, sample by sample. Marginals are named as in GGUF, in the format of `gguf_mixed.fisher`.
Between layers the gradients lie in the work folder, where a killed run goes on.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gguf_mixed.backward import MarginalSums
from gguf_mixed.hf_names import GEMMA4, HfNames
from vllm_gemma4q.calibration.activations import StoredActivations
from vllm_gemma4q.calibration.decoder import Decoder
from vllm_gemma4q.calibration.forward import layer_input, layout_of
from vllm_gemma4q.calibration.output_layer import OutputLayer
from vllm_gemma4q.calibration.recorder import FUSED, ROUTER, linears
from vllm_gemma4q.calibration.statistics import Array
from vllm_gemma4q.calibration.work import Work

Progress = Callable[[int], object]
FORWARDS_WORTH = 3  # one layer's backward pass takes about as long as so many forward passes
_OUTPUT, _LABELS, _EMBEDDINGS = "fisher-output", "fisher-labels", "fisher-embeddings"


class Backward:
    """The pass over the samples that the forward pass kept.

    Args:
        decoder: the model.
        samples: token ids of these samples, in order.
        work: the folder, where `Forward` left what entered each layer.
        seed: of the labels' draw.
        progress: called with tokens that have passed a layer, times FORWARDS_WORTH.
    """

    def __init__(
        self,
        decoder: Decoder,
        samples: Sequence[Sequence[int]],
        work: Work,
        seed: int = 0,
        progress: Progress = lambda tokens: None,
    ):
        self._decoder, self._samples, self._work = decoder, samples, work
        self._seed, self._progress = seed, progress
        self._layout = layout_of(decoder, samples)
        self._names = HfNames(GEMMA4, decoder.n_layers)

    def run(self) -> list[str]:
        """Names of the work folder's parts that make up the Fisher file: marginals of every linear but the router, of
        the embeddings, and of an output layer of its own."""
        output = self._output()
        for index in reversed(range(self._decoder.n_layers)):
            if not self._work.has(_part(index)):
                self._layer(index)
            self._progress(FORWARDS_WORTH * self._layout.ends[-1])
        if not self._work.has(_EMBEDDINGS):
            self._embeddings(output)
        return [_EMBEDDINGS, *map(_part, range(self._decoder.n_layers))]

    def _output(self) -> OutputLayer:
        """Draw labels and differentiate the output layer, or take up where that was done."""
        n_layers = self._decoder.n_layers
        hidden = StoredActivations(self._work.activations(layer_input(n_layers)), self._layout)
        output = OutputLayer(self._decoder, self._samples, hidden)
        if self._work.has(_LABELS):
            output.restore(self._work.read_part(_LABELS))
            return output
        output.draw(self._seed)
        sums = MarginalSums((self._decoder.architecture.vocab_size, self._decoder.architecture.hidden_size))
        output.differentiate(sums, self._gradients(n_layers, new=True))
        self._work.write_part(_OUTPUT, sums.state())
        self._work.write_part(_LABELS, output.state())
        return output

    def _layer(self, index: int) -> None:
        decoder, layer = self._decoder, self._decoder.layer(index)
        sums = _collect(layer, linears(decoder.architecture, index))
        inputs = StoredActivations(self._work.activations(layer_input(index)), self._layout)
        above, below = self._gradients(index + 1), self._gradients(index, new=True)
        for number in range(len(self._samples)):
            hidden = inputs.get(number).to(decoder.device).requires_grad_()
            torch.autograd.backward(decoder.run(layer, hidden), above.get(number).to(decoder.device))
            assert hidden.grad is not None
            below.put(number, hidden.grad)
        below.complete()
        self._work.write_part(_part(index), self._named(f"{decoder.layer_name(index)}.", sums))
        for done in (layer_input(index), _gradient(index + 1)):
            self._work.drop_activations(done)

    def _embeddings(self, output: OutputLayer) -> None:
        """The embeddings' gradients; where they are the output layer too, one tensor's two gradients add up."""
        decoder, below = self._decoder, self._gradients(0)
        shape = (decoder.architecture.vocab_size, decoder.architecture.hidden_size)
        embeddings, head = MarginalSums(shape), MarginalSums(shape)
        (embeddings if decoder.is_tied else head).restore(self._work.read_part(_OUTPUT))
        for number, sample in enumerate(self._samples):
            tokens, by_output = output.token_gradient(number)
            gradient = self._by_embedding(tokens, sample, below.get(number))
            if decoder.is_tied:
                gradient += by_output
            for row, token in enumerate(tokens.tolist()):
                embeddings.add(gradient[row : row + 1], row=token)
        found = {"embed_tokens": embeddings} if decoder.is_tied else {"embed_tokens": embeddings, "lm_head": head}
        arrays: dict[str, Array] = {}
        for name, sums in found.items():
            arrays |= self._named("" if name == "lm_head" else decoder.architecture.root, {name: sums})
        self._work.write_part(_EMBEDDINGS, arrays)

    def _by_embedding(self, tokens: torch.Tensor, sample: Sequence[int], above: torch.Tensor) -> torch.Tensor:
        """Gradient by the rows of `tokens`, [tokens, hidden]; that of the padding token is none, as in transformers."""
        decoder = self._decoder
        embedding = decoder.embedding(decoder.token_rows(tokens.tolist()))
        embedding.weight.requires_grad_()
        embedding(torch.searchsorted(tokens, torch.tensor(list(sample))).to(decoder.device)).backward(
            above.to(decoder.device)
        )
        gradient: torch.Tensor = embedding.weight.grad
        if decoder.config.pad_token_id is not None:
            gradient[(tokens == decoder.config.pad_token_id).to(decoder.device)] = 0
        return gradient

    def _gradients(self, index: int, new: bool = False) -> StoredActivations:
        return StoredActivations(self._work.activations(_gradient(index)), self._layout, new)

    def _named(self, prefix: str, sums: Mapping[str, MarginalSums]) -> dict[str, Array]:
        arrays: dict[str, Array] = {}
        for path, found in sums.items():
            name, marginals = self._names.gguf(prefix + path), found.marginals()
            assert name is not None
            arrays |= {f"{name}.rows": marginals.rows, f"{name}.columns": marginals.columns}
        return arrays


def chosen(n_samples: int, passes: int) -> list[int]:
    """Which samples of a calibration the backward pass takes: `passes` of them, spread evenly."""
    places = np.linspace(0, n_samples - 1, min(passes, n_samples)).round()
    return [int(place) for place in np.unique(places)]


def _collect(layer: Any, paths: Mapping[str, str]) -> dict[str, MarginalSums]:
    """Sums that fill while the layer is differentiated, by path of the linear."""
    sums: dict[str, MarginalSums] = {}
    for path in paths:
        if path in FUSED:
            sums[path] = MarginalSums(layer.get_parameter(path).shape)
        elif path != ROUTER:
            parameter = layer.get_submodule(path).weight.requires_grad_()
            sums[path] = MarginalSums(parameter.shape)
            parameter.register_post_accumulate_grad_hook(sums[path].take)
    if FUSED[0] in paths:
        layer.experts.matrices = tuple(_leaves(layer.get_parameter(path), sums[path]) for path in FUSED)
    return sums


def _leaves(parameter: torch.Tensor, sums: MarginalSums) -> list[torch.Tensor]:
    leaves = [matrix.requires_grad_() for matrix in parameter.detach().unbind()]
    for number, leaf in enumerate(leaves):
        leaf.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda matrix, number=number: sums.take(matrix, number)
        )
    return leaves


def _part(index: int) -> str:
    return f"fisher-{index:05d}"


def _gradient(index: int) -> str:
    return f"gradient-{index:05d}"
