"""Run by `parallel.py` in a process of its own: greedy answers of one engine, and what each of its ranks holds.

python benchmarks/parallel_engine.py REQUEST        JSON: engine (arguments of vllm.LLM), chats
"""

import json
import sys
from typing import Any


def held(model: Any) -> int:
    """Bytes of parameters and buffers, each once. Called in every worker."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def main(request: dict[str, Any]) -> None:
    """Print `FOUND` and a JSON document: tokens by chat, bytes by rank."""
    import parallel_engine  # workers find the function by the name of a module, which __main__ is not for them
    from vllm import LLM, SamplingParams

    llm = LLM(
        **request["engine"],
        max_model_len=512,
        enforce_eager=True,
        enable_prefix_caching=False,
        limit_mm_per_prompt={"image": 0, "video": 0, "audio": 0},
    )
    greedy = SamplingParams(temperature=0, max_tokens=16)
    found = llm.chat(request["chats"], greedy, use_tqdm=False)
    tokens = [list(one.outputs[0].token_ids) for one in found]
    print("FOUND " + json.dumps({"tokens": tokens, "bytes": llm.apply_model(parallel_engine.held)}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
