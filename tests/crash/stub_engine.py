"""In place of `vllm_gemma4q.evaluation.engines.vllm_process`: same request, same answer, no model.

Distributions are written window by window, as vLLM's workers do; all follows from the model's name. Without numpy,
whose import would be most of the time.
"""

import json
import math
import random
import sys
import zipfile
from array import array
from pathlib import Path
from typing import Any

VOCABULARY = 64


def main(request_path: str, answer_path: str) -> None:
    request = json.loads(Path(request_path).read_text())
    draw = random.Random(Path(request["engine"]["model"]).name)
    target = request["distributions"]
    logprobs = []
    for number, (tokens, first, last) in enumerate(request["windows"]):
        rows = [_distribution(draw) for _ in range(first, last)]
        logprobs += [row[token % VOCABULARY] for row, token in zip(rows, tokens[first:last], strict=True)]
        if target is not None:
            with Path(target).open("ab" if number else "wb") as file:
                file.write(b"".join(array("f", row).tobytes() for row in rows))
    with zipfile.ZipFile(answer_path, "w") as file:
        file.writestr("logprobs.npy", _npy("<f4", (len(logprobs),), array("f", logprobs)))
        file.writestr("vocabulary.npy", _npy("<i8", (), array("q", [VOCABULARY if target else 0])))
        file.writestr("seconds.npy", _npy("<f8", (), array("d", [0.0])))


def _distribution(draw: random.Random) -> list[float]:
    logits = [draw.gauss(0, 1) for _ in range(VOCABULARY)]
    total = math.log(sum(map(math.exp, logits)))
    return [logit - total for logit in logits]


def _npy(dtype: str, shape: tuple[int, ...], values: Any) -> bytes:
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(values.tobytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
