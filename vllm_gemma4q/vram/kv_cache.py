"""Bytes of the KV cache of one request of T tokens on one rank, by each engine's allocator.

A layer keeps K and V of each of its key heads, `head_dim` wide, for every token (full attention) or for those of its
window (sliding). Layers whose V weights are K's still cache both: K is normalised and rotated, V is not. Layers that
share the cache of an earlier one have none of their own.

Sources: vLLM 0.32 `v1/kv_cache_interface.py` (`SlidingWindowSpec.max_admission_blocks_per_request`) and
`v1/core/kv_cache_utils.py` (`unify_kv_cache_spec_page_size`, `_get_kv_cache_groups_uniform_page_size`,
`_max_memory_usage_bytes_from_groups`); llama.cpp b11434 `src/llama-kv-cache-iswa.cpp`, `src/llama-context.cpp`.
Not done here: vLLM's block-outermost layouts (no backend that Gemma 4 takes asks for one), llama.cpp without flash
attention (which pads V), pipeline and decode context parallelism, speculative decoding.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_gemma4q.architecture import SLIDING_ATTENTION, TextArchitecture
from vllm_gemma4q.errors import InputError

VLLM_BLOCK_SIZE = 16  # tokens; CacheConfig.DEFAULT_BLOCK_SIZE
_LLAMA_CPP_PAD = 256  # cells, of the context and of the sliding window's cache
_NEARLY_EQUAL = 1.5  # vLLM pads the smaller of two kinds of layers up to the larger one below this ratio


@dataclass(frozen=True)
class CachedLayer:
    """A layer that has a KV cache of its own."""

    is_sliding: bool
    heads: int
    head_dim: int

    def elements(self, ranks: int = 1) -> int:
        """Elements of K and V for each token on one rank; heads fewer than ranks are repeated."""
        return 2 * max(1, self.heads // ranks) * self.head_dim


@dataclass(frozen=True)
class CacheShape:
    """What a model caches: its layers, and the tokens in the window of the sliding ones."""

    layers: tuple[CachedLayer, ...]
    window: int


def cache_shape(architecture: TextArchitecture, config: Mapping[str, Any]) -> CacheShape:
    """What a checkpoint caches.

    Raises:
        InputError: config.json has no usable `sliding_window`.
    """
    text = config.get("text_config", config)
    window = text.get("sliding_window")
    if type(window) is not int or window < 1:
        raise InputError(f"config.json: sliding_window is {window!r}, expected a positive integer")
    layers = (
        CachedLayer(layer.layer_type == SLIDING_ATTENTION, layer.num_key_value_heads, layer.head_dim)
        for layer in architecture.layers
        if layer.has_key_value
    )
    return CacheShape(tuple(layers), window)


def least_bytes(cache: CacheShape, tokens: int, element_bytes: int, ranks: int = 1) -> int:
    """What any engine must keep: sliding layers their window and nothing more, without blocks or rounding."""
    kept = ((min(tokens, cache.window) if layer.is_sliding else tokens, layer) for layer in cache.layers)
    return element_bytes * sum(count * layer.elements(ranks) for count, layer in kept)


def full_context_bytes(cache: CacheShape, tokens: int, element_bytes: int) -> int:
    """Every layer keeps every token."""
    return tokens * element_bytes * sum(layer.elements() for layer in cache.layers)


def llama_cpp_bytes(cache: CacheShape, tokens: int, element_bytes: int, ubatch: int, swa_full: bool = False) -> int:
    """llama.cpp with one sequence: sliding layers keep their window and a micro-batch, or all with `--swa-full`."""
    context = _pad(tokens, _LLAMA_CPP_PAD)
    window = context if swa_full else _pad(min(context, cache.window + ubatch), _LLAMA_CPP_PAD)
    cells = ((window if layer.is_sliding else context) * layer.elements() for layer in cache.layers)
    return element_bytes * sum(cells)


@dataclass(frozen=True)
class _Group:
    """Layers that share block tables: how many tables, tokens in a block, layers of the largest table."""

    tables: int
    block_size: int
    layers: int
    is_sliding: bool


class VllmPool:
    """vLLM's pool of equally large blocks, from which every group of layers draws.

    Pages (one layer's part of a block) are made equal by giving layers with smaller ones more tokens a block, or by
    padding where sizes do not divide. Layers of one kind are cut into tables of as many layers as the rarer kind has.

    Args:
        in_flight: tokens scheduled and not yet settled, whose blocks sliding layers keep beside their window; None:
            nothing caps sliding layers, and they need blocks for the whole request.
    """

    def __init__(
        self,
        cache: CacheShape,
        element_bytes: int,
        in_flight: int | None,
        ranks: int = 1,
        block_size: int = VLLM_BLOCK_SIZE,
    ) -> None:
        self._held = None if in_flight is None else cache.window - 1 + in_flight
        kinds = Counter((layer.is_sliding, layer.elements(ranks)) for layer in cache.layers)
        pages = {kind: block_size * kind[1] * element_bytes for kind in kinds}
        page = max(pages.values())
        table = _layers_a_table(list(kinds.values()))
        self._groups = []
        for (is_sliding, elements), count in kinds.items():
            own = pages[is_sliding, elements]
            tokens = block_size * (page // own if page % own == 0 else 1)
            tables = -(-count // table)
            self._groups.append(_Group(tables, tokens, -(-count // tables), is_sliding))
        self.block_bytes = page * max(group.layers for group in self._groups)

    def blocks(self, tokens: int) -> int:
        """Blocks that a request of `tokens` needs."""
        return sum(group.tables * self._group_blocks(group, tokens) for group in self._groups)

    def request_bytes(self, tokens: int) -> int:
        """Bytes of the blocks that a request of `tokens` needs."""
        return self.blocks(tokens) * self.block_bytes

    def pool_bytes(self, tokens: int) -> int:
        """The smallest pool that serves a request of `tokens`: its blocks, and the null block that vLLM keeps."""
        return (self.blocks(tokens) + 1) * self.block_bytes

    def _group_blocks(self, group: _Group, tokens: int) -> int:
        if group.is_sliding and self._held is not None:
            # One more, for a window may begin inside a block.
            return -(-min(tokens, self._held) // group.block_size) + 1
        return -(-tokens // group.block_size)


def _layers_a_table(counts: list[int]) -> int:
    return max(counts) if max(counts) < _NEARLY_EQUAL * min(counts) else min(counts)


def _pad(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
