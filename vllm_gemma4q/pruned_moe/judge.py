"""Which of several prunes moves the model least? Answered by masking the router: no checkpoint is written.

For every candidate, on text that the scores have not seen: the Kullback-Leibler divergence of its next-token
distribution from the unpruned model's, over the whole vocabulary; how often both prefer the same token; and by layer
how far the experts' normed sum has moved (`post_feedforward_layernorm_2`, the norm that decides what of it enters the
residual), as the share of its energy.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_gemma4q.calibration.decoder import Decoder
from vllm_gemma4q.calibration.statistics import Array
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.pruned_moe.streams import Progress, Streams, Variant

_VALUES_AT_ONCE = 1 << 24
CONFIDENCE = 1.96  # standard errors of a 95% interval


@dataclass(frozen=True)
class Verdict:
    """One candidate against the unpruned model.

    Attributes:
        kld: float64 [positions], nats.
        by_sample: float64 [samples], mean of each.
        same_top: share of positions with the same most likely token.
        layer_error: float64 [layers], squared distance over squared norm of the experts' normed sum.
    """

    kld: Array
    by_sample: Array
    same_top: float
    layer_error: Array

    @property
    def mean(self) -> float:
        """Nats a position."""
        return float(self.kld.mean())

    @property
    def half_width(self) -> float:
        """Of the mean's 95% interval. Positions of a sample are not independent, so samples are what is counted."""
        n = len(self.by_sample)
        return CONFIDENCE * float(self.by_sample.std(ddof=1)) / n**0.5 if n > 1 else float("inf")

    def to_json(self) -> dict[str, Any]:
        """Figures without the positions."""
        return {
            "mean_kld": self.mean,
            "half_width": self.half_width,
            "median_kld": float(np.median(self.kld)),
            "p99_kld": float(np.quantile(self.kld, 0.99)),
            "same_top": self.same_top,
            "layer_error": self.layer_error.tolist(),
        }


def judge(
    decoder: Decoder,
    samples: Sequence[Sequence[int]],
    candidates: Mapping[str, Variant],
    limit: int = 4 << 30,
    progress: Progress = lambda tokens: None,
) -> dict[str, Verdict]:
    """Run the unpruned model and all candidates side by side, each from the first layer on that it changes.

    Args:
        samples: token ids.
        limit: bytes of activations to keep in memory; more go to a temporary folder.
        progress: called with tokens that have passed a layer, of any variant: `n_steps` in all.

    Raises:
        InputError: a tensor cannot be read, or the model's answers are not finite.
    """
    variants = list(candidates.values())
    errors = np.zeros((len(candidates), decoder.n_layers))
    with Streams(decoder, samples, len(candidates) + 1, limit) as streams, torch.no_grad():
        for index in range(decoder.n_layers):
            errors[:, index] = _layer(decoder, index, samples, streams, variants, progress)
        found = _divergences(decoder, samples, streams, [_stream(variants, number) for number in range(len(variants))])
    if not all(np.isfinite(kld).all() for kld, _ in found):
        raise InputError("the model's answers are not finite: try --dtype float32")
    ends = np.cumsum([len(sample) for sample in samples])[:-1]
    return {
        name: Verdict(kld, np.array([part.mean() for part in np.split(kld, ends)]), float(same.mean()), layer)
        for name, (kld, same), layer in zip(candidates, found, errors, strict=True)
    }


def n_steps(candidates: Mapping[str, Variant], n_layers: int, n_tokens: int) -> int:
    """What `progress` adds up to."""
    layers = sum(n_layers - _start(variant) for variant in candidates.values())
    return (n_layers + layers) * n_tokens


def _start(variant: Variant) -> int:
    """The first layer that a variant changes."""
    n_layers = len(variant.retained.kept)
    return next((index for index in range(n_layers) if variant.changes(index)), n_layers)


def _stream(variants: Sequence[Variant], number: int) -> int:
    """Where a variant's activations are at the end: one that changes nothing shares the unpruned model's."""
    return number + 1 if any(map(variants[number].changes, range(len(variants[number].retained.kept)))) else 0


def _layer(
    decoder: Decoder,
    index: int,
    samples: Sequence[Sequence[int]],
    streams: Streams,
    variants: Sequence[Variant],
    progress: Progress,
) -> Array:
    """All variants through one layer; how far each one's sum of experts is off."""
    layer = decoder.layer(index)
    distance, norm = np.zeros(len(variants)), 0.0
    started = [number for number, variant in enumerate(variants) if _start(variant) <= index]
    own = {number: variants[number].own(decoder, index) for number in started}
    with watched(layer) as normed:
        for sample, ids in enumerate(samples):
            entered = streams.get(0, sample).clone()
            streams.put(0, sample, decoder.run(layer, entered))
            expected = normed[0]
            norm += float(expected.square().sum())
            for number in started:
                is_first = _start(variants[number]) == index
                hidden = entered if is_first else streams.get(number + 1, sample)
                with variants[number].applied(layer, index, own[number]):
                    streams.put(number + 1, sample, decoder.run(layer, hidden))
                distance[number] += float((normed[0] - expected).square().sum())
            progress(len(ids) * (len(started) + 1))
    return np.asarray(distance / max(norm, 1e-300))


class watched:
    """Within, a list whose one item is what the layer's experts' norm gave last, float32 [tokens, hidden]."""

    def __init__(self, layer: Any):
        self._layer = layer

    def __enter__(self) -> list[torch.Tensor]:
        last: list[torch.Tensor] = [torch.empty(0)]

        def keep(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
            last[0] = output.reshape(-1, output.shape[-1]).float()

        self._handle = self._layer.post_feedforward_layernorm_2.register_forward_hook(keep)
        return last

    def __exit__(self, *error: object) -> None:
        self._handle.remove()


def _divergences(
    decoder: Decoder, samples: Sequence[Sequence[int]], streams: Streams, places: Sequence[int]
) -> list[tuple[Array, Array]]:
    """Of each candidate: float64 KLD and whether the most likely token is the same, both [positions].

    A part of the vocabulary is in memory at a time. With z the logits and Z the log of their exponentials' sum,
    KLD = sum p (z_p - z_q) - Z_p + Z_q; the sum runs along with Z_p, rescaled whenever a larger logit turns up.
    """
    norm, softcap = decoder.norm(), decoder.config.final_logit_softcapping
    sums = [[_Sums(len(sample)) for sample in samples] for _ in places]
    longest = max(map(len, samples))
    for weight, first in _parts(decoder, longest):
        for number in range(len(samples)):
            expected = _logits(norm(streams.get(0, number)), weight, softcap)
            for candidate, place in enumerate(places):
                got = _logits(norm(streams.get(place, number)), weight, softcap)
                sums[candidate][number].add(expected, got, first)
    return [
        (
            np.concatenate([part.kld().numpy() for part in parts]),
            np.concatenate([part.same_top().numpy() for part in parts]),
        )
        for parts in sums
    ]


def _parts(decoder: Decoder, longest: int) -> Iterator[tuple[torch.Tensor, int]]:
    size = max(1, _VALUES_AT_ONCE // max(decoder.architecture.hidden_size, longest))
    for first in range(0, decoder.architecture.vocab_size, size):
        yield decoder.head(first, min(first + size, decoder.architecture.vocab_size)), first


def _logits(normed: torch.Tensor, weight: torch.Tensor, softcap: float | None) -> torch.Tensor:
    logits = (normed @ weight.T).double()
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


class _Sums:
    """One sample of one candidate, over the vocabulary as it comes."""

    def __init__(self, n_tokens: int):
        lowest = torch.full((n_tokens,), -torch.inf, dtype=torch.float64)
        self._log_p, self._log_q = lowest.clone(), lowest.clone()
        self._difference = torch.zeros(n_tokens, dtype=torch.float64)
        self._top_p, self._top_q = lowest.clone(), lowest.clone()
        self._token_p, self._token_q = (torch.zeros(n_tokens, dtype=torch.int64) for _ in range(2))

    def add(self, p: torch.Tensor, q: torch.Tensor, first: int) -> None:
        """Logits [tokens, part of the vocabulary], float64, of tokens from `first` on."""
        log_p = torch.logaddexp(self._log_p, p.logsumexp(-1).cpu())
        share = ((p - log_p[:, None].to(p.device)).exp() * (p - q)).sum(-1).cpu()
        self._difference = self._difference * (self._log_p - log_p).exp() + share
        self._log_p, self._log_q = log_p, torch.logaddexp(self._log_q, q.logsumexp(-1).cpu())
        self._top_p, self._token_p = _larger(self._top_p, self._token_p, p, first)
        self._top_q, self._token_q = _larger(self._top_q, self._token_q, q, first)

    def kld(self) -> torch.Tensor:
        """Nats, float64; rounding below zero is zero."""
        return (self._difference - self._log_p + self._log_q).clamp_min(0)

    def same_top(self) -> torch.Tensor:
        return self._token_p == self._token_q


def _larger(
    top: torch.Tensor, token: torch.Tensor, logits: torch.Tensor, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    values, places = (found.cpu() for found in logits.max(-1))
    return torch.maximum(top, values), torch.where(values > top, places + first, token)
