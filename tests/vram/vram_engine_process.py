"""What test_vram_engine.py runs in a process."""

import json
from pathlib import Path

from vram_census import census


def main(checkpoint: Path, ranks: int, max_model_len: int, max_batched_tokens: int, answer: Path) -> None:
    """Start one vLLM engine on a CPU and write what it holds."""
    from vllm import LLM

    llm = LLM(
        model=str(checkpoint),
        enforce_eager=True,
        tensor_parallel_size=ranks,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_batched_tokens,
        max_num_seqs=16,
        enable_prefix_caching=False,
        limit_mm_per_prompt={"image": 1, "video": 0, "audio": 0},
    )
    config = llm.llm_engine.vllm_config
    found = {
        "ranks": llm.apply_model(census),
        "blocks": config.cache_config.num_gpu_blocks,
        "block_size": config.cache_config.block_size,
        "concurrency": config.cache_config.kv_cache_max_concurrency,
        "in_flight": config.max_in_flight_tokens,
    }
    answer.write_text(json.dumps(found))
