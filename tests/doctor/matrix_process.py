"""Start vLLM on a CPU on one checkpoint after the other, whatever becomes of the one before: what each really does.

python matrix_process.py REQUESTS.json RESULTS.json

Requests are as `vllm_plugin.engine_process` takes them; a result is `{"error": .., "logprobs": [[..], ..]}`.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from vllm_plugin.engine_process import answer, only_ours


def main(requests_path: str, results_path: str) -> None:
    collect = only_ours()
    results: list[dict[str, Any]] = []
    for request in json.loads(Path(requests_path).read_text()):
        try:
            arrays = answer(request)
            results.append({"error": None, "logprobs": _finite(arrays["logprobs/0"])})
        except Exception as error:
            traceback.print_exc()
            results.append({"error": f"{type(error).__name__}: {error}", "logprobs": None})
            _clean_up()
        collect()
        print(f"{request['engine']['model']}: {results[-1]['error'] or 'came up'}", flush=True)
        Path(results_path).write_text(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)  # what engines that failed left behind is no matter


def _clean_up() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def _finite(logprobs: np.ndarray) -> list[list[float]] | None:
    return logprobs.tolist() if np.isfinite(logprobs).all() else None


if __name__ == "__main__":
    main(*sys.argv[1:])
