"""The INT8 part of the demo: quantize file to file, compare the two checkpoints in vLLM, serve the new one and ask it.

They are compared as `gemma4q evaluate divergence` does it: by their next-token distributions
over the whole vocabulary, on text that neither has seen.
"""

import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.filesize import decimal
from small_gemma4 import held_out
from tqdm import tqdm

from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.evaluation.distributions import Divergence
from vllm_gemma4q.evaluation.engines.settings import Settings
from vllm_gemma4q.evaluation.measure import load_protocol
from vllm_gemma4q.evaluation.server import MODEL_NAME, Server, serve
from vllm_gemma4q.evaluation.windows import Framing
from vllm_gemma4q.quark_int8 import quantize as quark_int8
from vllm_gemma4q.summary import to_table

CHUNKS, CONTEXT = 8, 128
# None is needed to serve: they skip minutes of compilation.
QUICK_FLAGS = ("--max-model-len", "2048", "--enforce-eager")


def run(model: Path, output: Path, question: str) -> dict:
    """Quantize `model` into `output`/int8, serve both and measure."""
    target = output / f"{model.resolve().name}-int8"
    print(f"INT8 [1/3] Quantizing {model} to INT8", flush=True)
    started = time.perf_counter()
    conversion = quark_int8.plan(open_checkpoint(model))
    with tqdm(total=conversion.source_bytes, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        convert(conversion, target, ["make", "demo"], bar.update)
    seconds = time.perf_counter() - started

    print(f"INT8 [2/3] Measuring {model} and {target} in vLLM", flush=True)
    found = measure(model, target, output)
    print(f"INT8 [3/3] Serving {target} with vLLM", flush=True)
    with serve(target, QUICK_FLAGS, output / "vllm-serve.log") as server:
        answer = ask(server, question)
    return {
        "model": str(model),
        "checkpoint": str(target),
        "source_bytes": sum(path.stat().st_size for path in conversion.source.shards),
        "output_bytes": conversion.output_bytes,
        "quantize_seconds": round(seconds, 2),
        "roles": conversion.summary,
        "divergence": asdict(found),
        "question": question,
        "answer": answer,
        "command": " ".join(server.command),
    }


def measure(model: Path, other: Path, output: Path) -> Divergence:
    """Divergence on text that the small model was not trained on."""
    text, log = output / "held-out.txt", output / "vllm.log"
    text.write_text("\n\n".join(held_out.natural_text()), encoding="utf-8")
    log.write_bytes(b"")
    protocol = load_protocol([model], [text], [Framing.RAW], CONTEXT, CHUNKS, Settings(), log)
    with tempfile.TemporaryDirectory(dir=output) as folder:
        files = Path(folder, "reference"), Path(folder, "other")
        base, measured = (protocol.run(path, log, file) for path, file in zip((model, other), files, strict=True))
        return protocol.compare(base, measured)[Framing.RAW]


def ask(server: Server, question: str) -> str:
    """The answer of /v1/chat/completions, at temperature 0."""
    client = OpenAI(base_url=server.url, api_key="none")
    answer = client.chat.completions.create(
        model=MODEL_NAME, messages=[{"role": "user", "content": question}], max_tokens=64, temperature=0
    )
    return answer.choices[0].message.content or ""


def show(report: dict) -> None:
    console = Console(highlight=False, soft_wrap=True)
    before, after = report["source_bytes"], report["output_bytes"]
    title = f"{Path(report['model']).name}: BF16 {decimal(before)} -> INT8 {decimal(after)}"
    console.print(to_table(report["roles"], title))
    result = report["divergence"]
    console.print(
        f"Divergence from BF16 over {result['positions']} positions: mean KLD {result['mean_kld']:.2g} "
        f"± {result['error']:.1g} nats, 99th percentile {result['p99_kld']:.2g}, "
        f"same top token {result['same_top']:.1%}"
    )
    console.print(f"Question: {report['question']}")
    console.print(f"Answer:   {report['answer']!r}", markup=False)
    console.print(f"Checkpoint: {report['checkpoint']}", markup=False)
    console.print(f"Serve it:   vllm serve {report['checkpoint']}", markup=False)
