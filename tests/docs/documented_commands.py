"""The command lines that README and docs print, in the order of reading, and what stands in for a reader's own files.

A line is run as it is printed but for `ON_A_SMALL_MODEL`: sizes and counts that only a large model has.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from restore.damage import load, store

ROOT = Path(__file__).resolve().parents[2]
SMALL = ROOT / "examples" / "small_gemma4"
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("quantize", "prune", "gguf", "measure", "scale", "serve")),
]
# In the place of "gemma-4-31B": which has 60 layers and 30.7 billion weights, and the mixture 128 experts a layer.
ON_A_SMALL_MODEL = {
    "--size 14GiB": "--bpw 4.5",
    "--size 13GiB": "--bpw 4",
    "-it statistics.safetensors --text": "-it statistics.safetensors --samples 12 --max-length 256 --text",
    "-it hessians.safetensors --text": "-it hessians.safetensors --samples 12 --max-length 256 --text",
    "moe-statistics.safetensors --text": "moe-statistics.safetensors --samples 12 --max-length 256 --text",
    "--keep 98": "--keep 12 --samples 8 --max-length 256",
    "--workers 8": "--workers 2",
    "-tp 4 --vram 24GiB": "-tp 2 --vram 24GiB",
    "--context 8K": "--context 2K",
    "gemma4q bench": "gemma4q bench --quick",
    "--chunks 16": "--chunks 8",
    "gemma-4-31B.gguf gemma-4-31B-13GiB.gguf --text": "gemma-4-31B.gguf gemma-4-31B-13GiB.gguf --chunks 8 --text",
    "--sensitivity fisher.safetensors --text": "--sensitivity fisher.safetensors --chunks 8 --text",
    "doctor gemma-4-31B-int8 -tp 4": "doctor gemma-4-31B-int8 -tp 2",
}
# Characters of each text.
TEXTS = {"calibration": 30_000, "held-out": 12_000, "code": 12_000, "math": 12_000, "chat": 12_000}
# What another test or nothing here can run, and why.
NOT_RUN = {
    r"make \w+": "what CI and a newcomer run from a clean clone",
    r"pip install '\.": "tests/packaging installs what is built",
    r"gemma4q evaluate perplexity": "what the next line does, and tests/evaluation",
    r"gemma4q sweep": "tests/exl3 sweeps, for minutes",
    r"gemma4q tune": "needs a GPU",
    r".* --ray\b": "tests/scale has a cluster of two nodes",
    r"RAY_USAGE_STATS_ENABLED=0 ray start": "likewise",
    r"examples/multi_node.sh": "needs two machines; tests/examples has vLLM parse its flags",
    r"vllm serve gemma-4-26B-A4B-int8": "tests/vllm_plugin serves a mixture over ranks",
    r"GEMMA4Q_TILES=tiles vllm serve": "needs what tune wrote",
}


@dataclass(frozen=True)
class Line:
    """One documented command line."""

    page: str
    text: str

    @property
    def on_small_model(self) -> str:
        """As it is run."""
        text = self.text
        for documented, small in ON_A_SMALL_MODEL.items():
            text = text.replace(documented, small)
        return text


def documented_lines() -> list[Line]:
    """Every line of every block without a language, comments cut off, each once."""
    found: dict[str, Line] = {}
    for page in PAGES:
        for block in re.findall(r"^```\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            for line in block.splitlines():
                text = re.sub(r"\s+# .*", "", line).strip()
                if text and not any(re.match(pattern, text) for pattern in NOT_RUN):
                    found.setdefault(text, Line(page.stem, text))
    return list(found.values())


def prepare(folder: Path, text: str, convert: Callable[[str], Path]) -> None:
    """What a reader brings: two models, one of them as GGUF too, texts, questions, and a checkpoint to be mended.

    Args:
        text: English, some thousand tokens.
        convert: `dense` or `moe` to a GGUF file.
    """
    shutil.copytree(SMALL / "dense", folder / "gemma-4-31B-it")
    shutil.copytree(SMALL / "moe", folder / "gemma-4-26B-A4B-it")
    (folder / "gemma-4-31B.gguf").symlink_to(convert("dense"))
    for name, length in TEXTS.items():
        (folder / f"{name}.txt").write_text(text[:length])
        text = text[length:]
    for split, numbers in (("test", range(3)), ("train", range(3, 11))):
        lines = [
            json.dumps({"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"})
            for n in numbers
        ]
        (folder / f"gsm8k_{split}.jsonl").write_text("\n".join(lines))


def damage(folder: Path) -> None:
    """Somebody's FP8: ours, with scales that belong to nothing."""
    target = folder / "somebodys-fp8"
    if not target.exists():
        shutil.copytree(folder / "gemma-4-31B-fp8", target)
        tensors = load(target)
        tensors["model.vision_tower.stray.weight_scale"] = torch.ones(())
        store(target, tensors)
