"""What test_doctor_against_vllm.py runs in processes: vLLM on one checkpoint after the other, whatever became of the
one before.
"""

import json
import traceback
from pathlib import Path

import numpy as np
from vllm_plugin.engine_process import answer, only_ours


def main(folder: Path) -> None:
    """Requests are in requests.json, as `vllm_plugin.engine_process` takes them. The Nth leaves N.npy, which are its
    log-probabilities, or N.txt, what it died of.
    """
    collect = only_ours()
    for number, request in enumerate(json.loads((folder / "requests.json").read_text())):
        try:
            np.save(folder / f"{number}.npy", answer(request)["logprobs/0"])
            said = "came up"
        except Exception as error:
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}"
            (folder / f"{number}.txt").write_text(said)
            _clean_up()
        collect()
        print(f"{request['engine']['model']}: {said}", flush=True)


def _clean_up() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
