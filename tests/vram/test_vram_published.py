"""Published and hand-derived figures: the EXL3 card's 25 cells, and what the two models' caches must hold, in GiB."""

import pytest
from tolerances import VRAM_CELL, VRAM_DIGIT

from vllm_gemma4q.benchmark.shapes import MODELS
from vllm_gemma4q.vram.engines import ExLlamaV3, Request, parse_engine
from vllm_gemma4q.vram.kv_cache import VllmPool, full_context_bytes, least_bytes, llama_cpp_bytes
from vllm_gemma4q.vram.planned import Scheme
from vllm_gemma4q.vram.source import plan_source
from vllm_gemma4q.vram.table import rows_of
from vllm_gemma4q.vram.weights import Part

GIB = 2**30
EXL3_CONTEXTS = [1024 * 2**power for power in range(1, 6)]
EXL3_31B = {
    (3.5, 6): (19.15, 20.87, 24.3, 31.18, 44.93),
    (4, 6): (20.86, 22.57, 26.01, 32.89, 46.64),
    (5, 6): (24.27, 25.98, 29.42, 36.3, 50.05),
    (6, 6): (27.67, 29.39, 32.83, 39.71, 53.46),
    (8, 8): (34.82, 36.54, 39.98, 46.85, 60.6),
}
BODY_AND_HEAD = {(3.5, 6): 12.93, (4, 6): 14.64, (5, 6): 18.05, (6, 6): 21.46, (8, 8): 28.60}
CONTEXTS = [1024 * 2**power for power in range(1, 9)]
LEAST = {
    ("31B", 2): (0.94, 1.09, 1.41, 2.03, 3.28, 5.78, 10.78, 20.78),
    ("31B", 1): (0.47, 0.55, 0.70, 1.02, 1.64, 2.89, 5.39, 10.39),
    ("26B-A4B", 2): (0.23, 0.27, 0.35, 0.51, 0.82, 1.45, 2.70, 5.20),
    ("26B-A4B", 1): (0.12, 0.14, 0.18, 0.25, 0.41, 0.72, 1.35, 2.60),
}


@pytest.mark.parametrize("bits", EXL3_31B, ids=lambda bits: f"{bits[0]:g}h{bits[1]}")
def test_the_25_cells_of_the_published_exl3_table(bits):
    source = plan_source("31B", Scheme.EXL3, *bits)
    [row] = rows_of([source], [ExLlamaV3()], Request(), EXL3_CONTEXTS)
    assert [row.total(tokens) / GIB for tokens in EXL3_CONTEXTS] == pytest.approx(EXL3_31B[bits], abs=VRAM_CELL, rel=0)
    parts = {part: size / GIB for part, size in row.weights.items()}
    assert parts[Part.BODY] + parts[Part.HEAD] == pytest.approx(BODY_AND_HEAD[bits], abs=VRAM_DIGIT, rel=0)
    assert parts[Part.EMBEDDING] == 2.625
    assert parts[Part.VISION] == pytest.approx(1.07, abs=VRAM_DIGIT, rel=0)


def test_its_bound_would_show_a_tenth_of_a_bit():
    """A body of 4.1 bits is out of every cell of 4."""
    source = plan_source("31B", Scheme.EXL3, 4.1, 6)
    [row] = rows_of([source], [ExLlamaV3()], Request(), EXL3_CONTEXTS)
    for tokens, cell in zip(EXL3_CONTEXTS, EXL3_31B[4, 6], strict=True):
        assert abs(row.total(tokens) / GIB - cell) > VRAM_CELL


def test_that_allocator_takes_901120_bytes_a_token():
    assert full_context_bytes(plan_source("31B", Scheme.BF16).cache, 1, 2) == 901_120


@pytest.mark.parametrize(("model", "size"), LEAST, ids=lambda value: str(value))
def test_what_the_cache_must_hold(model, size):
    cache = plan_source(model, Scheme.BF16).cache
    found = [least_bytes(cache, tokens, size) / GIB for tokens in CONTEXTS]
    assert found == pytest.approx(LEAST[model, size], abs=VRAM_DIGIT, rel=0)


@pytest.mark.parametrize("model", MODELS)
def test_vllm_decoding_one_token_holds_that_and_two_blocks(model):
    """With one token in flight: the windows of 1024, a block where a window begins inside one, and the null block."""
    cache = plan_source(model, Scheme.BF16).cache
    pool = VllmPool(cache, 2, in_flight=1)
    sliding = sum(2 * 2 * layer.heads * layer.head_dim for layer in cache.layers if layer.is_sliding)
    for tokens in CONTEXTS:
        assert pool.pool_bytes(tokens) == least_bytes(cache, tokens, 2) + 16 * sliding + pool.block_bytes


def test_tokens_in_flight_cost_what_they_hold():
    """31B, FP16: 1.5625 GiB for each 2048, and nothing where the request is shorter than the cap."""
    cache = plan_source("31B", Scheme.BF16).cache
    one, two = (VllmPool(cache, 2, in_flight).request_bytes(131072) for in_flight in (2048, 4096))
    assert (two - one) / GIB == 1.5625
    one, two = (VllmPool(cache, 2, in_flight).request_bytes(2048) for in_flight in (2048, 4096))
    assert one == two


def test_vllm_before_0_21_holds_every_token_in_every_layer():
    source = plan_source("31B", Scheme.BF16)
    old, null = parse_engine("vllm==0.20.2"), VllmPool(source.cache, 2, None).block_bytes
    assert old.in_flight(source, Request()) is None
    for tokens in CONTEXTS:
        assert old.cache_bytes(source, Request(), tokens) == 901_120 * tokens + null


def test_vllm_counts_one_batch_before_0_26():
    source = plan_source("31B", Scheme.BF16)
    versions = ("0.21.0", "0.25.1", "0.26.0", "0.32.0+cpu", "0.33")
    assert [parse_engine(f"vllm=={v}").in_flight(source, Request()) for v in versions] == [2496] * 2 + [4992] * 3


@pytest.mark.parametrize(
    ("tokens", "ubatch", "swa_full", "full_cells", "sliding_cells"),
    [
        (32768, 512, False, 32768, 1536),
        (32768, 2048, False, 32768, 3072),
        (32768, 300, False, 32768, 1536),
        (1000, 512, False, 1024, 1024),
        (1280, 512, False, 1280, 1280),
        (32768, 512, True, 32768, 32768),
    ],
)
def test_llama_cpp_pads_the_context_and_the_window(tokens, ubatch, swa_full, full_cells, sliding_cells):
    """31B: 10 layers of 4 x 512 and 50 of 16 x 256, K and V, FP16."""
    cache = plan_source("31B", Scheme.BF16).cache
    expected = 81_920 * full_cells + 819_200 * sliding_cells
    assert llama_cpp_bytes(cache, tokens, 2, ubatch, swa_full) == expected
