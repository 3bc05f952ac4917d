"""Run by `parallel.py`, one process a rank: greedy answers of one engine after the other, and what this rank holds.

python benchmarks/parallel_engine.py REQUEST RESULTS

REQUEST is a JSON file: chats, and a list of engines (arguments of vllm.LLM). RANK, WORLD_SIZE and MASTER_ADDR are as
torch wants them, MASTER_PORTS has a port an engine. After each engine RESULTS, a JSON file, has one result more: tokens
by chat and bytes, or what vLLM died of. Importing vLLM costs ten times what starting a small engine does, so processes
stay.
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from vllm_plugin.engine_process import meet_at_ports


def held(model: Any) -> int:
    """Bytes of parameters and buffers, each once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def ask(engine: dict[str, Any], chats: list[Any]) -> dict[str, Any]:
    """What the ranks answer together, and what this one holds."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        **engine,
        distributed_executor_backend="external_launcher",
        max_model_len=256,
        max_num_seqs=8,
        num_gpu_blocks_override=64,  # else a gigabyte of zeros a rank
        enforce_eager=True,
        enable_prefix_caching=False,
        limit_mm_per_prompt={"image": 0, "video": 0, "audio": 0},
    )
    found = llm.chat(chats, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
    return {"tokens": [list(one.outputs[0].token_ids) for one in found], "bytes": llm.apply_model(held)[0]}


def main(request: dict[str, Any], target: Path) -> None:
    """Ask every engine; one that fails leaves its reason, and the next one is asked."""
    # vLLM collects garbage eight times an engine, all modules' objects too: half of the time of small ones.
    collect, gc.collect = gc.collect, lambda generation=2: 0
    meet_at_ports()
    results: list[dict[str, Any]] = []
    for engine, port in zip(request["engines"], os.environ["MASTER_PORTS"].split(), strict=True):
        os.environ["MASTER_PORT"] = port
        try:
            results.append(ask(engine, request["chats"]))
        except Exception as error:
            traceback.print_exc()
            results.append({"refused": f"{type(error).__name__}: {error}"})
        _clean_up()
        collect()
        _write(target, results)
    sys.stdout.flush()
    os._exit(0)  # what engines that failed left behind is no matter


def _clean_up() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def _write(target: Path, results: list[dict[str, Any]]) -> None:
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(results))
    partial.replace(target)  # `parallel.py` reads while we write


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
