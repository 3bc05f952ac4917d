"""The whole model in transformers, float32, routers masked: what every position says, and experts' normed sums."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


@dataclass
class Answers:
    """Over all samples: `logprobs` float64 [positions, vocabulary]; `normed` by layer, float64 [positions, hidden]."""

    logprobs: torch.Tensor
    normed: list[torch.Tensor]

    def divergence_from(self, other: "Answers") -> torch.Tensor:
        """KLD of `other`'s distribution from this one's, float64 [positions], nats."""
        return (other.logprobs.exp() * (other.logprobs - self.logprobs)).sum(-1)

    def same_top(self, other: "Answers") -> float:
        return float((self.logprobs.argmax(-1) == other.logprobs.argmax(-1)).double().mean())

    def layer_error(self, other: "Answers") -> torch.Tensor:
        pairs = zip(self.normed, other.normed, strict=True)
        return torch.stack([(mine - theirs).square().sum() / theirs.square().sum() for mine, theirs in pairs])


class MaskedModel:
    """A checkpoint, loaded once."""

    def __init__(self, folder: Path):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._layers = self.model.model.language_model.layers

    @torch.no_grad()
    def run(self, samples: Sequence[Sequence[int]], kept: Sequence[Sequence[int]] | None = None) -> Answers:
        """All samples; `kept` by layer, None for all experts."""
        logprobs, normed = [], [[] for _ in self._layers]
        with self._masked(kept or [range(layer.router.proj.out_features) for layer in self._layers]):
            handles = [
                layer.post_feedforward_layernorm_2.register_forward_hook(
                    lambda _, args, output, found=found: found.append(output[0].double())
                )
                for layer, found in zip(self._layers, normed, strict=True)
            ]
            for sample in samples:
                logits = self.model(input_ids=torch.tensor([list(sample)]), use_cache=False).logits[0]
                logprobs.append(logits.double().log_softmax(-1))
            for handle in handles:
                handle.remove()
        return Answers(torch.cat(logprobs), [torch.cat(found) for found in normed])

    @contextmanager
    def _masked(self, kept: Sequence[Sequence[int]]) -> Iterator[None]:
        handles = []
        for layer, experts in zip(self._layers, kept, strict=True):
            mask = torch.full((layer.router.proj.out_features,), -torch.inf)
            mask[list(experts)] = 0
            hook = lambda _, args, logits, mask=mask: logits + mask  # noqa: E731
            handles.append(layer.router.proj.register_forward_hook(hook))
        yield
        for handle in handles:
            handle.remove()
