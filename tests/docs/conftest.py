"""One folder in which all documented commands run, one after the other, with what a reader would bring."""

import gzip
import subprocess
import sys
from pathlib import Path

import pytest
from docs.documented_commands import ROOT, SMALL, prepare

from gguf_mixed.llama_cpp import cache_folder


@pytest.fixture(scope="session")
def reader_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once; what one command writes, later ones read."""
    folder = tmp_path_factory.mktemp("reader")
    converter = cache_folder() / "source" / "convert_hf_to_gguf.py"
    if not converter.exists():
        subprocess.run([sys.executable, ROOT / "environment" / "build_llama_cpp.py"], check=True)

    def convert(kind: str) -> Path:
        output = tmp_path_factory.mktemp("gguf") / f"{kind}.gguf"
        command = [sys.executable, converter, SMALL / kind, "--outtype", "bf16", "--outfile", output]
        subprocess.run(command, check=True, capture_output=True)
        return output

    prepare(folder, _english(), convert)
    return folder


def _english() -> str:
    """The text that the small models learned, 370,000 characters."""
    return gzip.decompress((SMALL / "corpus.txt.gz").read_bytes()).decode()
