"""vLLM's own cache specs and its planner, asked about the same layers, say the same bytes.

No engine starts: a configuration of full size without weights, vLLM's `SlidingWindowSpec` and `FullAttentionSpec` for
every layer, and the functions that size its pool at startup.
"""

import json

import pytest

from vllm_gemma4q.architecture import parse_text_architecture
from vllm_gemma4q.benchmark.shapes import MODELS
from vllm_gemma4q.vram.engines import Request, parse_engine
from vllm_gemma4q.vram.kv_cache import VllmPool, cache_shape
from vllm_gemma4q.vram.planned import VISION_PARAMETERS, VISION_WIDTH, Scheme, published_config
from vllm_gemma4q.vram.source import plan_source

GIB = 2**30
CONTEXTS = [2**power for power in range(11, 19)] + [1000, 5000, 100001]
SHAPES = {name: cache_shape(parse_text_architecture(published_config(sizes)), published_config(sizes))
          for name, sizes in MODELS.items()}  # fmt: skip


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory):
    """vLLM's configuration of a Gemma 4 whose `max_model_len` tests set."""
    from vllm.engine.arg_utils import EngineArgs

    folder = tmp_path_factory.mktemp("config")
    text = {**published_config(MODELS["31B"]), "architectures": ["Gemma4ForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(text))
    arguments = EngineArgs(model=str(folder), skip_tokenizer_init=True, enforce_eager=True, max_num_batched_tokens=2048)
    config = arguments.create_engine_config()
    config.cache_config.kv_cache_layout = "LBNHC"  # what vLLM prefers where backends take any
    return config


def specs(shape, dtype, ranks=1, block_size=16):
    """What vLLM's attention layers would report (`Attention.get_kv_cache_spec`)."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    found = {}
    for index, layer in enumerate(shape.layers):
        common = {"block_size": block_size, "num_kv_heads": max(1, layer.heads // ranks)}
        common |= {"head_size": layer.head_dim, "dtype": dtype}
        if layer.is_sliding:
            found[f"layers.{index}"] = SlidingWindowSpec(sliding_window=shape.window, **common)
        else:
            found[f"layers.{index}"] = FullAttentionSpec(**common)
    return found


@pytest.mark.parametrize("model", MODELS)
def test_every_layer_as_its_spec_says(vllm_config, model):
    """The sum over layers of `max_memory_usage_bytes`, where all layers have pages of one block size."""
    import torch
    from vllm.v1.core.kv_cache_utils import max_memory_usage_bytes

    shape, in_flight = SHAPES[model], vllm_config.max_in_flight_tokens
    for tokens in (tokens for tokens in CONTEXTS if tokens % 32 == 0):
        vllm_config.model_config.max_model_len = tokens
        expected = max_memory_usage_bytes(vllm_config, specs(shape, torch.float16).values())
        assert VllmPool(shape, 2, in_flight).request_bytes(tokens) == expected


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_pool_as_vllm_plans_it(vllm_config, model, size, ranks):
    """With pages made equal and layers grouped, padding included, for every context and split."""
    import torch
    from vllm.v1.core import kv_cache_utils

    shape, in_flight = SHAPES[model], vllm_config.max_in_flight_tokens
    dtype = {1: torch.float8_e4m3fn, 2: torch.bfloat16}[size]
    groups = kv_cache_utils.get_kv_cache_groups(vllm_config, specs(shape, dtype, ranks))
    pool = VllmPool(shape, size, in_flight, ranks)
    assert pool.block_bytes == kv_cache_utils._pool_bytes_per_block(vllm_config, groups)
    for tokens in CONTEXTS:
        vllm_config.model_config.max_model_len = tokens
        expected = kv_cache_utils._max_memory_usage_bytes_from_groups(vllm_config, groups)
        assert pool.request_bytes(tokens) == expected
        assert pool.pool_bytes(tokens) == expected + pool.block_bytes


def test_vllm_starts_with_this_pool_and_not_with_a_byte_less(vllm_config):
    import torch
    from vllm.v1.core.kv_cache_utils import check_enough_kv_cache_memory

    shape, tokens = SHAPES["31B"], 32768
    vllm_config.model_config.max_model_len = tokens
    needed = VllmPool(shape, 2, vllm_config.max_in_flight_tokens).pool_bytes(tokens)
    check_enough_kv_cache_memory(vllm_config, specs(shape, torch.float16), needed)
    with pytest.raises(ValueError, match="is needed, which is larger than the available KV cache memory"):
        check_enough_kv_cache_memory(vllm_config, specs(shape, torch.float16), needed - 1)


def test_tokens_in_flight_are_two_batches(vllm_config):
    """vLLM schedules asynchronously by default where the platform can; its CPU platform turns that off."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import gemma4_mm

    batch = vllm_config.scheduler_config.max_num_batched_tokens
    assert vllm_config.max_in_flight_tokens == batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_config.scheduler_config, "async_scheduling", True)
        assert vllm_config.max_in_flight_tokens == 2 * batch
    assert EngineArgs.__dataclass_fields__["gpu_memory_utilization"].default == 0.92
    videos = gemma4_mm._VIDEO_MAX_FRAMES * (gemma4_mm._VIDEO_MAX_SOFT_TOKENS + 2 + 6)
    source = plan_source("31B", Scheme.BF16)
    assert parse_engine("vllm").in_flight(source, Request()) == 2 * videos
    assert parse_engine("vllm").in_flight(source, Request(gpu_bytes=80 * GIB)) == 2 * 8192
    assert parse_engine("vllm").in_flight(source, Request(gpu_bytes=192 * GIB)) == 2 * 16384


def test_block_size_is_vllms(vllm_config):
    from vllm.config import CacheConfig

    from vllm_gemma4q.vram.kv_cache import VLLM_BLOCK_SIZE

    assert CacheConfig.DEFAULT_BLOCK_SIZE == VLLM_BLOCK_SIZE


def test_planned_vision_tower_is_transformers():
    import torch
    from transformers import AutoModel
    from transformers.models.gemma4 import Gemma4VisionConfig

    config = Gemma4VisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=72,
        standardize=True,
    )
    with torch.device("meta"):
        tower = AutoModel.from_config(config)
    assert sum(tensor.numel() for tensor in tower.state_dict().values()) == VISION_PARAMETERS
