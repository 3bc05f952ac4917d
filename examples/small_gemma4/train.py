"""Training on text, chats and pictures together: AdamW with a cosine schedule in float32, two threads, fixed seeds.

The router of `moe` gets the usual load-balancing loss, E * sum_e(share of tokens of e * mean probability of e).
Not done: resuming; a run takes minutes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import Gemma4ForConditionalGeneration, Gemma4Processor

from small_gemma4 import batches, chats, corpus, pictures

THREADS = 2


@dataclass(frozen=True)
class Recipe:
    """Sizes and rates of one training run."""

    steps: int
    seed: int = 0
    text_rows: int = 6
    text_length: int = 192
    chat_tokens: int = 1400
    picture_rows: int = 4
    learning_rate: float = 6e-3
    warmup: int = 50
    weight_decay: float = 0.05
    balance: float = 0.01
    threads: int = THREADS


class RouterProbe:
    """Collects each router's probabilities [N, E] (float32) and choices [N, k] (int64) of the last forward pass."""

    def __init__(self, model: Gemma4ForConditionalGeneration) -> None:
        self.routed: list[tuple[torch.Tensor, torch.Tensor]] = []
        for layer in model.model.language_model.layers:
            if layer.enable_moe_block:
                layer.router.register_forward_hook(self._record)

    def _record(self, _module: torch.nn.Module, _inputs: object, output: tuple[torch.Tensor, ...]) -> None:
        self.routed.append((output[0], output[2]))

    def take(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """One (probabilities, choices) pair a MoE layer and forward pass since the last call."""
        routed, self.routed = self.routed, []
        return routed


def balance_loss(routed: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Load-balancing loss averaged over layers; 1 when experts are used evenly, 0 without experts."""
    if not routed:
        return torch.zeros(())
    losses = []
    for probabilities, choices in routed:
        n_experts = probabilities.shape[-1]
        share = torch.bincount(choices.flatten(), minlength=n_experts).float() / choices.numel()
        losses.append(n_experts * (share * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def weighted_loss(model: Gemma4ForConditionalGeneration, batch: batches.Batch) -> torch.Tensor:
    """Mean negative log-likelihood in nats a token, weighted by the batch's weights."""
    inputs, weights = batch
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.flatten(0, 1), inputs["input_ids"][:, 1:].flatten(), reduction="none")
    wanted = weights[:, 1:].flatten()
    return (losses * wanted).sum() / wanted.sum()


def rate(step: int, recipe: Recipe) -> float:
    """Learning rate of a step: linear warm-up, then a cosine down to 2% of the peak."""
    warm = min(1.0, (step + 1) / min(recipe.warmup, recipe.steps))
    return recipe.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))


def build_optimizer(model: Gemma4ForConditionalGeneration, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), eps=1e-8)


def streams(processor: Gemma4Processor, recipe: Recipe) -> list[Iterator[batches.Batch]]:
    """The three endless sources of batches: text, chats, pictures."""
    tokenizer, seed = processor.tokenizer, recipe.seed
    texts = corpus.training_sections()
    return [
        batches.text_batches(texts, tokenizer, recipe.text_rows, recipe.text_length, seed),
        batches.chat_batches(chats.generate(seed, held_out=False), tokenizer, recipe.chat_tokens, seed),
        batches.picture_batches(pictures.generate(seed, held_out=False), processor, recipe.picture_rows),
    ]


def train(model: Gemma4ForConditionalGeneration, processor: Gemma4Processor, recipe: Recipe) -> None:
    """Train `model` in place; every step sees all three kinds of data."""
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    optimizer, probe, sources = build_optimizer(model, recipe), RouterProbe(model), streams(processor, recipe)
    model.set_experts_implementation("grouped_mm")
    model.train()
    progress = tqdm(range(recipe.steps), desc="training", unit="step", disable=None)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = rate(step, recipe)
        losses = []
        for source in sources:
            loss = weighted_loss(model, next(source))
            torch.autograd.backward(loss + recipe.balance * balance_loss(probe.take()))
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.set_postfix_str(" ".join(f"{loss:.3f}" for loss in losses), refresh=False)
    model.eval()
