"""Start vLLM on a CPU on one checkpoint after the other, whatever becomes of the one before: what each really does.

python matrix_process.py REQUESTS.json FOLDER

Requests are as `vllm_plugin.engine_process` takes them. Of the Nth, FOLDER gets N.npy, its log-probabilities, or N.txt,
what it died of.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import numpy as np
from vllm_plugin.engine_process import answer, only_ours


def main(requests_path: str, folder: str) -> None:
    collect = only_ours()
    for number, request in enumerate(json.loads(Path(requests_path).read_text())):
        try:
            np.save(Path(folder, f"{number}.npy"), answer(request)["logprobs/0"])
            said = "came up"
        except Exception as error:
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}"
            Path(folder, f"{number}.txt").write_text(said)
            _clean_up()
        collect()
        print(f"{request['engine']['model']}: {said}", flush=True)
    sys.stdout.flush()
    os._exit(0)  # what engines that failed left behind is no matter


def _clean_up() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(*sys.argv[1:])
