"""The small trained Gemma 4 models as GGUF files, made by llama.cpp's own programs."""

import subprocess
import sys
from pathlib import Path

from gguf_mixed.llama_cpp import cache_folder
from gguf_mixed.perplexity import positions_of

ROOT = Path(__file__).resolve().parents[2]
CONTEXT, CHUNKS = 128, 8
POSITIONS = CHUNKS * positions_of(CONTEXT)


def converter() -> Path:
    """llama.cpp's conversion script, which comes with the sources that environment/build_llama_cpp.py unpacks."""
    return cache_folder() / "source" / "convert_hf_to_gguf.py"


def checkpoint(kind: str) -> Path:
    """The folder of the `dense` or `moe` checkpoint."""
    return ROOT / "examples" / "small_gemma4" / kind


def convert(source: Path, output: Path, dtype: str = "f32") -> Path:
    """A checkpoint, as convert_hf_to_gguf.py writes it: about 6 s."""
    command = [sys.executable, converter(), source, "--outtype", dtype]
    finished = subprocess.run([*command, "--outfile", output], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return output


def quantize(tool: Path, model: Path, qtype: str) -> Path:
    """The model with llama-quantize's own mix of a name, beside it."""
    output = model.with_name(f"{model.stem}-{qtype}.gguf")
    finished = subprocess.run([tool, model, output, qtype, "1"], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return output
