"""Run one vLLM engine on a CPU: read a request as JSON, write arrays and answers. See `engine.py`.

python engine_process.py REQUEST.json ANSWERS.npz
"""

import json
import sys
from pathlib import Path

import numpy as np


def main(request_path: str, answers_path: str) -> None:
    from vllm import LLM, SamplingParams

    request = json.loads(Path(request_path).read_text())
    llm = LLM(**request["engine"])
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    width = llm.llm_engine.model_config.get_vocab_size()
    arrays: dict[str, np.ndarray] = {}
    greedy = SamplingParams(temperature=0, max_tokens=request["max_tokens"], prompt_logprobs=-1, ignore_eos=True)
    for index, output in enumerate(llm.generate(prompts, greedy, use_tqdm=False) if prompts else []):
        arrays[f"logprobs_{index}"] = _full_vocabulary(output.prompt_logprobs[1:], width)
        arrays[f"tokens_{index}"] = np.array(output.outputs[0].token_ids)
    chats = [_chat(image, question) for image, question in request["pictures"]]
    answers = llm.chat(chats, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False) if chats else []
    arrays["texts"] = np.array([answer.outputs[0].text for answer in answers])
    np.savez(answers_path, **arrays)


def _full_vocabulary(positions: list, width: int) -> np.ndarray:
    """[T, V] float32 from one mapping of token id to log-probability a position; ids never scored stay -inf."""
    table = np.full((len(positions), width), -np.inf, dtype=np.float32)
    for row, scores in zip(table, positions, strict=True):
        row[list(scores)] = [score.logprob for score in scores.values()]
    return table


def _chat(image: str, question: str) -> list[dict]:
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


if __name__ == "__main__":
    main(*sys.argv[1:])
