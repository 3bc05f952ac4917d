"""The INT8 part of the demo: quantize file to file, serve the original and the INT8 checkpoint, compare, ask both.

The two are compared by their next-token distributions on text that neither has seen, and by one question over HTTP.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.filesize import decimal
from small_gemma4 import held_out
from tqdm import tqdm
from transformers import AutoTokenizer

from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.evaluation.divergence import Scores, divergence, prompt_scores
from vllm_gemma4q.evaluation.server import MODEL_NAME, Server, serve
from vllm_gemma4q.quark_int8 import quantize as quark_int8
from vllm_gemma4q.summary import to_table

PROMPTS, PROMPT_TOKENS, TOP = 8, 96, 1000
# None is needed to serve: they allow TOP scores a position, and skip minutes of compilation.
MEASURING_FLAGS = ("--max-logprobs", str(TOP), "--max-model-len", "2048", "--enforce-eager")


def run(model: Path, output: Path, question: str) -> dict:
    """Quantize `model` into `output`/int8, serve both and measure."""
    target = output / f"{model.resolve().name}-int8"
    print(f"INT8 [1/3] Quantizing {model} to INT8", flush=True)
    started = time.perf_counter()
    conversion = quark_int8.plan(open_checkpoint(model))
    with tqdm(total=conversion.source_bytes, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        convert(conversion, target, ["make", "demo"], bar.update)
    seconds = time.perf_counter() - started

    prompts = held_out_prompts(model)
    answers, scores, commands = {}, {}, {}
    for step, (name, checkpoint) in enumerate({"bf16": model, "int8": target}.items(), start=2):
        print(f"INT8 [{step}/3] Serving {checkpoint} with vLLM and measuring it", flush=True)
        with serve(checkpoint, MEASURING_FLAGS, output / f"vllm-{name}.log") as server:
            scores[name] = measure(server, prompts)
            answers[name] = ask(server, question)
            commands[name] = " ".join(server.command)
    return {
        "model": str(model),
        "checkpoint": str(target),
        "source_bytes": sum(path.stat().st_size for path in conversion.source.shards),
        "output_bytes": conversion.output_bytes,
        "quantize_seconds": round(seconds, 2),
        "roles": conversion.summary,
        "divergence": asdict(divergence(scores["bf16"], scores["int8"])),
        "question": question,
        "answers": answers,
        "commands": commands,
    }


def held_out_prompts(model: Path) -> list[list[int]]:
    """Token ids of text that the small model was not trained on, each with the model's first token in front."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = held_out.natural_text()[:PROMPTS]
    return [
        [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)][:PROMPT_TOKENS] for text in texts
    ]


def measure(server: Server, prompts: Sequence[Sequence[int]]) -> list[Scores]:
    client = client_of(server)
    progress = tqdm(prompts, desc="prompts", disable=not sys.stderr.isatty())
    return [scores for prompt in progress for scores in prompt_scores(client, MODEL_NAME, prompt, TOP)]


def ask(server: Server, question: str) -> str:
    """The answer of /v1/chat/completions, at temperature 0."""
    answer = client_of(server).chat.completions.create(
        model=MODEL_NAME, messages=[{"role": "user", "content": question}], max_tokens=64, temperature=0
    )
    return answer.choices[0].message.content or ""


def client_of(server: Server) -> OpenAI:
    return OpenAI(base_url=server.url, api_key="none")


def show(report: dict) -> None:
    console = Console(highlight=False, soft_wrap=True)
    before, after = report["source_bytes"], report["output_bytes"]
    title = f"{Path(report['model']).name}: BF16 {decimal(before)} -> INT8 {decimal(after)}"
    console.print(to_table(report["roles"], title))
    result = report["divergence"]
    console.print(
        f"Divergence from BF16 over {result['positions']} positions: mean KLD {result['mean_kld']:.2g} "
        f"± {result['standard_error']:.1g} nats, 99th percentile {result['p99_kld']:.2g}, "
        f"same top token {result['same_top']:.1%}"
    )
    console.print(f"Question: {report['question']}")
    for name, answer in report["answers"].items():
        console.print(f"  {name}: {answer!r}", markup=False)
    console.print(f"Checkpoint: {report['checkpoint']}", markup=False)
    console.print(f"Serve it:   vllm serve {report['checkpoint']}", markup=False)
