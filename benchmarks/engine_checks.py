"""What one version of vLLM answers; run by `engine_versions.py` with the Python of that version's environment.

    PYTHON benchmarks/engine_checks.py REQUESTS.json ANSWERS.npz

REQUESTS: {"checkpoints": {name: folder}, "texts": [token ids], "chats": [token ids]}. ANSWERS: for each checkpoint
`NAME/logprobs`, float32 [positions, V], and `NAME/tokens` as JSON, or `NAME/error` where it failed; `missing`, what the
plugin should have registered and has not.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from vllm_plugin.engine import Answers, EngineError, Request, ask_all, engine_environment  # noqa: E402

REGISTERED = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
from vllm.model_executor.models import ModelRegistry
names = ("gemma4q_quark_int8", "gemma4q_fp8_static", "gemma4q_exl3")
missing = [name for name in names if name not in QUANTIZATION_METHODS]
if getattr(ModelRegistry.models["Gemma4ForCausalLM"], "module_name", None) != "vllm_gemma4q.model":
    missing.append("Gemma4ForCausalLM")
print("missing:", *missing)
"""


def missing_registrations(folder: Path) -> list[str]:
    """Methods, and the model, that are not the plugin's after vLLM has loaded its plugins."""
    command = [sys.executable, "-c", REGISTERED]
    done = subprocess.run(command, env=engine_environment(), cwd=folder, capture_output=True, text=True, check=False)
    found = re.search(r"^missing:(.*)$", done.stdout, re.MULTILINE)
    return found[1].split() if found else [reason(done.stderr)]


def ask_each(requests: dict[str, Request]) -> dict[str, Answers | EngineError]:
    """All in one process, which is quick; where that dies, each in its own."""
    try:
        return dict(zip(requests, ask_all(list(requests.values())), strict=True))
    except EngineError:
        return {name: _ask_alone(request) for name, request in requests.items()}


def _ask_alone(request: Request) -> Answers | EngineError:
    try:
        return ask_all([request])[0]
    except EngineError as error:
        return error


def reason(log: str) -> str:
    """The last line that names an exception, or the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(?:[\[(].*?[\])]:? )*[\w.]*(?:Error|Exception)\b", line)]
    return (named or lines or ["no output"])[-1][:300]


def main(requests_path: str, answers_path: str) -> None:
    asked = json.loads(Path(requests_path).read_text())
    prompts = asked["texts"] + asked["chats"]
    requests = {name: Request(Path(folder), prompts) for name, folder in asked["checkpoints"].items()}
    arrays = {"missing": np.array(missing_registrations(Path(answers_path).parent), dtype=str)}
    for name, answers in ask_each(requests).items():
        if isinstance(answers, EngineError):
            arrays[f"{name}/error"] = np.array(reason(str(answers)))
            Path(answers_path).with_name(f"{name}.log").write_text(str(answers))
        else:
            arrays[f"{name}/logprobs"] = np.concatenate(answers.logprobs[: len(asked["texts"])])
            arrays[f"{name}/tokens"] = np.array(json.dumps(answers.tokens[len(asked["texts"]) :]))
    np.savez(answers_path, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
