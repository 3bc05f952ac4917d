"""The output layer differentiated with a part of the vocabulary in memory at a time.

Three passes over the parts: the logarithm of the softmax's denominator, the labels, the gradients. Each position's
label is drawn from the model's own prediction, like `gguf_mixed.backward` does and with the same numbers: it lies where
the running sum of probabilities passes the drawn point.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from gguf_mixed.backward import MarginalSums, draw_points
from vllm_gemma4q.calibration.activations import StoredActivations
from vllm_gemma4q.calibration.decoder import Decoder
from vllm_gemma4q.calibration.statistics import Array

_VALUES_AT_ONCE = 1 << 23


class OutputLayer:
    """Final norm, output layer and drawn labels of some samples.

    Args:
        decoder: the model.
        samples: token ids.
        hidden: what enters the final norm, all samples.
    """

    def __init__(self, decoder: Decoder, samples: Sequence[Sequence[int]], hidden: StoredActivations):
        self._decoder, self._samples, self._hidden = decoder, samples, hidden
        self._norm = decoder.norm()
        self._softcap: float | None = decoder.config.final_logit_softcapping
        self._tokens = [torch.unique(torch.tensor(list(sample))) for sample in samples]
        self._denominators = [torch.full((len(sample),), -torch.inf, dtype=torch.float64) for sample in samples]
        self._labels = [torch.full((len(sample),), -1) for sample in samples]

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """Draw every position's label."""
        generator = torch.Generator().manual_seed(seed)
        points = [draw_points(len(sample), generator) for sample in self._samples]
        for _, weight in self._parts():
            for number, denominator in enumerate(self._denominators):
                logits, _ = self._logits(number, weight)
                found = logits.float().logsumexp(-1).double().cpu()
                self._denominators[number] = torch.logaddexp(denominator, found)
        sums = [torch.zeros(len(sample), 1, dtype=torch.float64) for sample in self._samples]
        for start, weight in self._parts():
            for number in range(len(self._samples)):
                running = self._probabilities(number, weight).cpu().cumsum(-1, dtype=torch.float64) + sums[number]
                place = torch.searchsorted(running, points[number], right=True)[:, 0]
                found = (self._labels[number] < 0) & (place < len(weight))
                self._labels[number][found] = start + place[found]
                sums[number] = running[:, -1:]
        for labels in self._labels:  # a point behind the last sum, by rounding
            labels[labels < 0] = self._decoder.architecture.vocab_size - 1

    @torch.no_grad()
    def differentiate(self, sums: MarginalSums, gradients: StoredActivations) -> None:
        """Gradients of the labels' summed -log p.

        Args:
            sums: of the output layer's weight; where that is the embeddings, without the rows of a sample's own
                tokens, which have another gradient yet to come: see `token_gradient`.
            gradients: gets those by `hidden`, all samples.
        """
        by_norm = [torch.zeros(len(sample), self._norm.weight.shape[0]) for sample in self._samples]
        for start, weight in self._parts():
            for number in range(len(self._samples)):
                by_logits = self._by_logits(number, weight, torch.arange(start, start + len(weight)))
                gradient = by_logits.T @ self._normed(number)
                if self._decoder.is_tied:
                    own = self._tokens[number] - start
                    gradient[own[(own >= 0) & (own < len(weight))].to(gradient.device)] = 0
                sums.add(gradient, row=start)
                by_norm[number] += (by_logits @ weight).float().cpu()
        for number, gradient in enumerate(by_norm):
            gradients.put(number, self._through_norm(number, gradient))
        gradients.complete()

    @torch.no_grad()
    def token_gradient(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens of a sample, ascending; the gradient by their rows of the output layer [tokens, hidden])"""
        tokens = self._tokens[number]
        by_logits = self._by_logits(number, self._decoder.token_rows(tokens.tolist()), tokens)
        return tokens, by_logits.T @ self._normed(number)

    def state(self) -> Mapping[str, Array]:
        """Labels and denominators, to go on with later."""
        return {
            "labels": torch.cat(self._labels).numpy(),
            "denominators": torch.cat(self._denominators).numpy(),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take back what `state` gave."""
        ends = np.cumsum([len(sample) for sample in self._samples])[:-1]
        self._labels = [torch.from_numpy(part) for part in np.split(state["labels"], ends)]
        self._denominators = [torch.from_numpy(part) for part in np.split(state["denominators"], ends)]

    def _parts(self) -> Iterator[tuple[int, torch.Tensor]]:
        architecture = self._decoder.architecture
        longest = max(map(len, self._samples))
        size = max(1, _VALUES_AT_ONCE // max(architecture.hidden_size, longest))
        for start in range(0, architecture.vocab_size, size):
            yield start, self._decoder.head(start, min(start + size, architecture.vocab_size))

    def _normed(self, number: int) -> torch.Tensor:
        normed: torch.Tensor = self._norm(self._hidden.get(number).to(self._decoder.device))
        return normed

    def _logits(self, number: int, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A sample's logits of some tokens, [T, tokens], and where they are capped the cap's derivative."""
        logits = self._normed(number) @ weight.T
        if self._softcap is None:
            return logits, None
        bent = torch.tanh(logits / self._softcap)
        return bent * self._softcap, 1 - bent.square()

    def _probabilities(self, number: int, weight: torch.Tensor) -> torch.Tensor:
        logits, _ = self._logits(number, weight)
        return (logits.float() - self._denominator(number)).exp()

    def _denominator(self, number: int) -> torch.Tensor:
        return self._denominators[number][:, None].float().to(self._decoder.device)

    def _by_logits(self, number: int, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Gradient by the uncapped logits of `tokens` [n], whose rows `weight` holds: [T, n]."""
        logits, derivative = self._logits(number, weight)
        gradient = (logits.float() - self._denominator(number)).exp()
        gradient -= (self._labels[number][:, None] == tokens).to(gradient)
        gradient = gradient.to(logits.dtype)
        return gradient if derivative is None else gradient * derivative

    def _through_norm(self, number: int, gradient: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            hidden = self._hidden.get(number).to(self._decoder.device).requires_grad_()
            normed = self._norm(hidden)
            (found,) = torch.autograd.grad(normed, hidden, gradient.to(normed))
        return found
