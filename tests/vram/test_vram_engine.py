"""A real engine on two ranks holds the bytes that we say: every part of the weights, and the blocks of its cache.

One start of the small dense model: its single global key head is repeated, its sliding ones are split.
"""

import json
import os
import re
from pathlib import Path

import engine_forks
import pytest
import vram_engine_process

from vllm_gemma4q.vram.kv_cache import VllmPool
from vllm_gemma4q.vram.source import open_source
from vllm_gemma4q.vram.weights import Part, vllm_bytes

HERE = Path(__file__).parent
DENSE = HERE.parents[1] / "examples" / "small_gemma4" / "dense"
RANKS, MAX_MODEL_LEN, BATCHED, POOL_BYTES = 2, 512, 256, 2**30
TIMEOUT_SECONDS = 600
PARTS = (
    (r"vision_tower\.|embed_vision\.", Part.VISION),
    (r"embed_tokens\.", Part.EMBEDDING),
    (r"_proj\.weight$", Part.BODY),
    ("", Part.OTHER),
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    cores = os.cpu_count() or 1
    environment = os.environ | {
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to send the census to the workers
        "VLLM_CPU_KVCACHE_SPACE": str(POOL_BYTES // 2**30),
        "VLLM_CPU_OMP_THREADS_BIND": "0|1" if cores > 1 else "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": str(HERE),
    }
    folder = tmp_path_factory.mktemp("engine")
    answer, log = folder / "answer.json", folder / "log"
    call = engine_forks.Call((DENSE, RANKS, MAX_MODEL_LEN, BATCHED, answer), environment, log)
    assert engine_forks.run(vram_engine_process.main, [call], TIMEOUT_SECONDS) == [0], log.read_text()
    return json.loads(answer.read_text())


@pytest.mark.engine
@pytest.mark.slow
def test_weights_of_each_rank(engine):
    source = open_source(DENSE)
    assert source.architecture is not None
    expected = vllm_bytes(source.architecture, source.tensors, RANKS)
    assert len(engine["ranks"]) == RANKS
    for sizes in engine["ranks"]:
        found = dict.fromkeys(expected, 0)
        for name, size in sizes.items():
            found[next(part for pattern, part in PARTS if re.search(pattern, name))] += size
        assert found == expected


@pytest.mark.engine
@pytest.mark.slow
def test_blocks_and_how_many_requests_they_serve(engine):
    cache = open_source(DENSE).cache
    pool = VllmPool(cache, 2, engine["in_flight"], RANKS, engine["block_size"])
    assert engine["blocks"] == POOL_BYTES // pool.block_bytes
    assert engine["concurrency"] == engine["blocks"] / pool.blocks(MAX_MODEL_LEN)
