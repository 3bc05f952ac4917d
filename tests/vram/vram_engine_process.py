"""Start one vLLM engine on a CPU and print, as the last line, what it holds.

python vram_engine_process.py CHECKPOINT RANKS MAX_MODEL_LEN MAX_BATCHED_TOKENS
"""

import json
import sys

from vram_census import census


def main(checkpoint: str, ranks: str, max_model_len: str, max_batched_tokens: str) -> None:
    from vllm import LLM

    llm = LLM(
        model=checkpoint,
        enforce_eager=True,
        tensor_parallel_size=int(ranks),
        max_model_len=int(max_model_len),
        max_num_batched_tokens=int(max_batched_tokens),
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
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
