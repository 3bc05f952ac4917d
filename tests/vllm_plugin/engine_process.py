"""What the processes of `engine.py` run: vLLM engines on a CPU, one after the other.

One of several ranks has RANK, WORLD_SIZE and MASTER_ADDR as torch wants them, and in MASTER_PORTS a port an engine.
"""

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def main(requests_path: Path, answers_path: Path) -> None:
    """Read requests as JSON, write arrays."""
    collect = only_ours()
    arrays: dict[str, np.ndarray] = {}
    ports = os.environ.get("MASTER_PORTS", "").split()
    if ports:
        meet_at_ports()
    for index, request in enumerate(json.loads(requests_path.read_text())):
        if ports:
            os.environ["MASTER_PORT"] = ports[index]
        print(f"\n### engine {index}: {request['engine']['model']}", flush=True)
        arrays |= {f"{index}/{name}": array for name, array in answer(request).items()}
        collect()
    np.savez(answers_path, **arrays)


def meet_at_ports() -> None:
    """Ranks that were started from outside meet at MASTER_PORT in so many words. vLLM names shared memory after the
    address, and with "env://" all such engines of a machine would have the same."""
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    def address(self: Any) -> tuple[str, int, int]:
        names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK")
        host, port, rank, local_rank = (os.environ[name] for name in names)
        return f"tcp://{host}:{port}", int(rank), int(local_rank)

    ExecutorWithExternalLauncher._distributed_args = address


def only_ours() -> Callable[[], None]:
    """What collects garbage, and nobody else does from now on: vLLM does it eight times an engine, through the objects
    of all modules, which is half of the time of small ones. Here those of the first engine's modules are left out."""
    everything, freeze = gc.collect, gc.freeze
    gc.collect = lambda generation=2: 0
    gc.freeze = gc.unfreeze = lambda: None

    def collect() -> None:
        everything()
        if not gc.get_freeze_count():
            freeze()

    return collect


def answer(request: dict[str, Any]) -> dict[str, np.ndarray]:
    """Start one engine, ask it everything, stop it."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(**request["engine"])
    arrays: dict[str, np.ndarray] = {}
    greedy = SamplingParams(temperature=0, max_tokens=request["max_tokens"], prompt_logprobs=-1, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    width = llm.llm_engine.model_config.get_vocab_size()
    for index, output in enumerate(llm.generate(prompts, greedy, use_tqdm=False) if prompts else []):
        arrays[f"logprobs/{index}"] = _full_vocabulary(output.prompt_logprobs[1:], width)
        arrays[f"tokens/{index}"] = np.array(output.outputs[0].token_ids)
    chats = [_chat(image, question) for image, question in request["pictures"]]
    texts = llm.chat(chats, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False) if chats else []
    arrays["texts"] = np.array([text.outputs[0].text for text in texts])
    in_process = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"
    arrays["parameter_bytes"] = np.array(json.dumps(llm.apply_model(_parameter_bytes)[0] if in_process else {}))
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return arrays


def _full_vocabulary(positions: list, width: int) -> np.ndarray:
    """[T, V] float32 from one mapping of token id to log-probability a position; ids never scored stay -inf."""
    table = np.full((len(positions), width), -np.inf, dtype=np.float32)
    for row, scores in zip(table, positions, strict=True):
        row[list(scores)] = [score.logprob for score in scores.values()]
    return table


def _parameter_bytes(model: Any) -> dict[str, int]:
    """Of a loaded model, by dtype."""
    total: dict[str, int] = {}
    for parameter in model.parameters():
        dtype = str(parameter.dtype).removeprefix("torch.")
        total[dtype] = total.get(dtype, 0) + parameter.nbytes
    return total


def _chat(image: str, question: str) -> list[dict]:
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]
