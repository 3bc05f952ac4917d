"""The real 26B-A4B, headers only: 98 of its 128 experts, planned in seconds."""

import random
import time

import pytest
from prune_files import retained
from synthetic import CONFIG_26B_A4B, shapes, write_header_only

from gguf_mixed.drop_map import RetainedExperts
from vllm_gemma4q.architecture import parse_text_architecture
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.pruned_moe.prune import plan
from vllm_gemma4q.quark_int8 import quantize

LAYERS, EXPERTS, WIDTH, HIDDEN = 30, 128, 704, 2816


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("26b") / "source"
    return open_checkpoint(write_header_only(folder, CONFIG_26B_A4B, shapes(CONFIG_26B_A4B).items()))


@pytest.fixture(scope="module")
def some():
    generator = random.Random(0)
    return retained([sorted(generator.sample(range(EXPERTS), 98)) for _ in range(LAYERS)], EXPERTS)


def test_98_of_128_experts(source, some):
    started = time.perf_counter()
    conversion = plan(source, some)
    assert time.perf_counter() - started < 10
    assert parse_text_architecture(source.config).parameters() == pytest.approx(25.233e9, abs=5e5)
    assert parse_text_architecture(conversion.config).parameters() == pytest.approx(19.878e9, abs=5e5)
    dropped = LAYERS * 30 * (3 * WIDTH * HIDDEN + HIDDEN + 1)
    total = conversion.summary["total"]
    assert total["parameters_before"] - total["parameters_after"] == dropped
    assert conversion.output_bytes == pytest.approx(total["bytes_before"] - 2 * dropped, rel=1e-4)
    assert all(shard.n_bytes <= 5e9 for shard in conversion.shards)


def test_neighbours_are_read_as_one(source):
    kept = (*range(40), *range(50, 100), 120)
    conversion = plan(source, RetainedExperts(EXPERTS, (kept,) * LAYERS))
    step = next(step for step in conversion.steps if step.source.name.endswith("layers.7.experts.down_proj"))
    size = 2 * HIDDEN * WIDTH
    starts = [((start - step.source.start) / size, (stop - step.source.start) / size) for start, stop in step.spans]
    assert starts == [(0, 40), (50, 100), (120, 121)]


def test_a_quantized_one_of_34_thousand_tensors(source, some, tmp_path):
    """Headers as the INT8 quantizer would write them."""
    outputs = [output for step in quantize.plan(source).steps for output in step.written]
    config = {**CONFIG_26B_A4B, "quantization_config": {"quant_method": "quark", "exclude": ["lm_head"]}}
    int8 = open_checkpoint(write_header_only(tmp_path / "int8", config, [(o.name, o.shape) for o in outputs]))
    assert len(int8.tensors) > 20_000
    started = time.perf_counter()
    conversion = plan(int8, some)
    assert time.perf_counter() - started < 10
    assert len(int8.tensors) - len(conversion.steps) == LAYERS * 30 * 3 * 2
