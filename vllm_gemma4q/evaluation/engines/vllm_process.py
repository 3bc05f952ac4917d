"""Run by `engines/vllm.py` in a process of its own: start vLLM once, score windows, write arrays.

    python -m vllm_gemma4q.evaluation.engines.vllm_process REQUEST.json ANSWER.npz

REQUEST: `engine` (arguments of `vllm.LLM`), `windows` ([tokens, first, last]), `distributions` (a file to write, null).
ANSWER: `logprobs` float32 [predicted tokens], `vocabulary` of the distributions (0 without), `seconds` of scoring.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def main(request_path: str, answer_path: str) -> None:
    """Score and exit."""
    from tqdm import tqdm
    from vllm import LLM, SamplingParams

    request = json.loads(Path(request_path).read_text())
    windows = [tuple(window) for window in request["windows"]]
    llm = LLM(**request["engine"])
    if request["distributions"]:
        spans = [(first - 1, last - 1) for _, first, last in windows]
        llm.collective_rpc("gemma4q_record", args=(request["distributions"], spans))
    # The prompt's own tokens are asked for, one new token has to be.
    parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    started = time.monotonic()
    logprobs: list[float] = []
    for tokens, first, last in tqdm(windows, unit="window", disable=not sys.stderr.isatty()):
        (output,) = llm.generate([{"prompt_token_ids": tokens}], parameters, use_tqdm=False)
        assert output.prompt_logprobs is not None
        logprobs += [_of(output.prompt_logprobs[index], tokens[index]) for index in range(first, last)]
    seconds = time.monotonic() - started
    vocabulary = 0
    if request["distributions"]:
        done, vocabulary = next(found for found in llm.collective_rpc("gemma4q_stop") if found is not None)
        if done != len(windows):
            raise RuntimeError(f"distributions: recorded {done} windows, expected {len(windows)}")
    np.savez(answer_path, logprobs=np.array(logprobs, np.float32), vocabulary=vocabulary, seconds=seconds)


def _of(scores: Any, token: int) -> float:
    """The log-probability of a prompt's token, from vLLM's mapping of one position."""
    return float(scores[token].logprob)


if __name__ == "__main__":
    main(*sys.argv[1:])
