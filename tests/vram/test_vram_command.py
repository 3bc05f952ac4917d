"""`gemma4q vram` as users run it: the published table with vLLM beside, files, what fits, pictures, refusals."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from synthetic import small_config, write_checkpoint, write_json

GIB = 2**30
SMALL = Path(__file__).resolve().parents[2] / "examples" / "small_gemma4"
BITS = ("--bits", "3.5,4,5,6,8", "--head-bits", "6,6,6,6,8")


@pytest.fixture
def vram(gemma4q):
    """Runs the command; returns its exit code, stdout and stderr."""
    return partial(gemma4q, "vram")


@pytest.fixture
def rows(vram):
    """Runs it with --json; returns the rows."""

    def run(*arguments):
        code, out, err = vram(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)["rows"]

    return run


def totals(row):
    return [entry["total_bytes"] for entry in row["contexts"]]


def test_published_table_with_vllm_beside(rows):
    found = rows("31B", *BITS, "--engine", "exllamav3", "--context", "2K,4K,8K,16K,32K")
    assert [(row["scheme"], row["engine"]) for row in found][:3] == [
        ("exl3 3.5 h6", "exllamav3"),
        ("exl3 3.5 h6", "vllm 0.32.0"),
        ("exl3 4 h6", "exllamav3"),
    ]
    assert len(found) == 10
    card, real = found[6:8]
    assert [round(total / GIB, 2) for total in totals(card)] == [27.67, 29.39, 32.83, 39.71, 53.46]
    assert [round(total / GIB, 2) for total in totals(real)] == [26.89, 28.61, 30.39, 31.01, 32.26]
    assert (card["other_bytes"], card["other_source"]) == (round(0.8 * GIB), "published EXL3 table")
    assert (real["other_bytes"], real["other_source"]) == (None, "not measured")
    assert (card["in_flight_tokens"], real["in_flight_tokens"]) == (None, 4992)


def test_the_table_says_what_it_lacks(vram):
    code, out, _ = vram("31B", "--context", "8K", "--kv-dtype", "fp8", "-tp", "4")
    assert code == 0
    assert out.splitlines()[0] == "31B, each of 4 GPUs: GiB for one request, by its tokens; KV cache fp8"
    assert "least: windows only" in out and "not measured" in out
    assert "Where other memory is not measured, totals lack it" in out


def test_a_head_of_16_bits_is_the_embedding(rows):
    [packed], [left] = (rows("31B", "--bits", "4", "--head-bits", bits, "--engine", "vllm") for bits in ("8", "16"))
    assert packed["weights_bytes"]["head"] > 262144 * 5376
    assert {**packed["weights_bytes"], "head": None} == {**left["weights_bytes"], "head": None}
    assert "head" not in left["weights_bytes"]


def test_overhead_is_counted(rows):
    [without], [with_it] = (rows("31B", "--context", "8K", *more) for more in ((), ("--overhead", "1.5GiB")))
    assert totals(with_it)[0] - totals(without)[0] == 1.5 * GIB
    assert (with_it["other_bytes"], with_it["other_source"]) == (1.5 * GIB, "--overhead")


def test_in_flight_is_as_told(rows):
    found = [rows("31B", "--context", "64K", "--in-flight", tokens)[0] for tokens in (2048, 4096)]
    sizes = [row["contexts"][0]["kv_cache_bytes"] for row in found]
    assert [row["in_flight_tokens"] for row in found] == [2048, 4096]
    assert sizes[1] - sizes[0] == 819_200 * 2048


@pytest.mark.parametrize("engine", ["vllm", "vllm==0.20.0", "exllamav3"])
def test_longest_is_the_last_that_fits(rows, engine):
    arguments = ("31B", "--bits", "4", "--engine", engine)
    longest = rows(*arguments, "--vram", "32GiB", "--context", "2K")[0]["longest_context"]
    assert 2048 < longest < 262144
    budget = 32 * GIB * (1 if engine == "exllamav3" else 0.92)
    [entry] = [
        row for row in rows(*arguments, "--context", f"{longest},{longest + 1}") if row["engine"].startswith(engine[:4])
    ]
    fits, does_not = totals(entry)
    assert fits <= budget < does_not


def test_longest_where_nothing_fits(vram):
    code, out, _ = vram("31B", "--vram", "24GiB", "--context", "2K")
    assert code == 0 and "none" in out
    found = json.loads(vram("31B", "--vram", "24GiB", "--context", "2K", "--json")[1])
    assert found["rows"][0]["longest_context"] == 0
    assert found["gpu_bytes"] == 24 * GIB


def test_checkpoint_folder(rows):
    """The small dense model: its file less the header, and K for V in two layers (one head of 64, 256 inputs, BF16)."""
    [row] = rows(SMALL / "dense", "--context", "1K")
    path = SMALL / "dense" / "model.safetensors"
    data = path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
    assert sum(row["weights_bytes"].values()) == data + 2 * 64 * 256 * 2
    assert row["scheme"] == "unquantized"


def test_default_contexts_end_with_the_model(rows):
    assert [entry["tokens"] for entry in rows(SMALL / "dense")[0]["contexts"]] == [2048, 4096]


def test_a_checkpoint_that_asks_for_an_fp8_cache(rows, tmp_path):
    """compressed-tensors names a kv_cache_scheme, which `auto` follows in vLLM."""
    config = small_config(sliding_window=16)
    sizes = []
    for name, scheme in (("plain", None), ("fp8", {"num_bits": 8, "type": "float"})):
        folder = write_checkpoint(tmp_path / name, config)
        quantization = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}
        write_json(folder / "config.json", {**config, "quantization_config": quantization})
        sizes.append(rows(folder, "--context", "8K")[0]["contexts"][0]["kv_cache_bytes"])
    assert sizes[0] == 2 * sizes[1]


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """Three layers, two of them sliding, one sharing the cache of another; weights of 4 x 256 F32."""

    def write(name, untied, **changes):
        path = tmp_path_factory.mktemp("gguf") / f"{name}.gguf"
        writer = GGUFWriter(path, arch=changes.pop("arch", "gemma4"))
        keys = {"block_count": 4, "context_length": 65536, "attention.key_length": 32, "attention.key_length_swa": 16}
        keys |= {"attention.sliding_window": 1024, "attention.shared_kv_layers": 1}
        for key, value in {**keys, **changes}.items():
            writer.add_uint32(f"gemma4.{key}", value)
        writer.add_array("gemma4.attention.head_count_kv", [2, 2, 1, 2])
        writer.add_array("gemma4.attention.sliding_window_pattern", [True, True, False, True])
        for tensor in ("token_embd.weight", "blk.0.attn_q.weight", *(["output.weight"] if untied else [])):
            writer.add_tensor(tensor, np.zeros((4, 256), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.mark.parametrize("untied", [False, True])
def test_gguf_file(rows, gguf_file, untied):
    """On the GPU: one block, and one output layer, which is the embedding where there is no other."""
    path = gguf_file("model", untied)
    [row] = rows(path, "--context", "8K")
    assert (row["engine"], row["scheme"], row["in_flight_tokens"]) == ("llama.cpp b11434", "GGUF", 512)
    assert row["weights_bytes"] == {"body": 4096, "head": 4096}
    assert row["contexts"][0]["kv_cache_bytes"] == 2 * 2 * (2 * 2 * 16 * 1536 + 1 * 32 * 8192)
    [full] = rows(path, "--context", "8K", "--swa-full")
    assert full["contexts"][0]["kv_cache_bytes"] == 2 * 2 * (2 * 2 * 16 + 1 * 32) * 8192


def test_plot(vram, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    path = tmp_path / "vram.png"
    code, out, _ = vram("31B", *BITS, "--vram", "24GiB", "--plot", path, "--json")
    assert code == 0
    assert json.loads(out)["rows"]
    image = matplotlib.image.imread(path)
    assert image.shape[:2] == (720, 1080)
    assert len({tuple(pixel) for pixel in image[::4, ::4].reshape(-1, image.shape[2])}) > 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["27B"], "27B: got no such folder, expected a checkpoint folder, a .gguf file or 31B or 26B-A4B"),
        (["31B", "--context", "2K,many"], "--context: got 'many', expected numbers of tokens such as 2K,4K,100000"),
        (["31B", "--context", "0"], "--context: got '0', expected numbers of tokens such as 2K,4K,100000"),
        (
            ["31B", "--context", "512K"],
            "--context 512K: got 524288 tokens, expected at most 262144, the model's own limit",
        ),
        (["31B", "--engine", "tgi"], "--engine tgi: expected vllm, vllm==VERSION, exllamav3 or llama.cpp"),
        (["31B", "--engine", "exllamav3==1"], "--engine exllamav3==1: expected vllm, vllm==VERSION, exllamav3 or"),
        (["31B", "--engine", "vllm==x"], "--engine vllm==x: got no version, expected one such as 0.32.0"),
        (["31B", "--engine", "vllm==0.18.1"], "--engine vllm==0.18.1: expected 0.19 or later, which know Gemma 4"),
        (["31B", "--engine", "llama.cpp"], "31B: got safetensors, expected a .gguf file for llama.cpp"),
        (["31B", "--engine", "exllamav3", "-tp", "2"], "-tp 2: expected 1 for exllamav3: only vLLM's split is known"),
        (
            ["31B", "--engine", "exllamav3", "--kv-dtype", "fp8"],
            "--kv-dtype fp8: expected auto or fp16 for exllamav3",
        ),
        (["31B", "-tp", "3"], "-tp 3: layer 0 has 16 key heads, expected a multiple or a divisor of 3"),
        (["31B", "--scheme", "exl3"], "--scheme exl3: --bits is missing, expected bits a weight such as 3.5"),
        (["31B", "--head-bits", "6"], "--scheme exl3: --bits is missing, expected bits a weight such as 3.5"),
        (["31B", "--bits", "4", "--scheme", "bf16"], "--bits 4: expected nothing: --scheme bf16 does not use it"),
        (["31B", "--bits", "9"], "--bits 9: expected numbers from 1 to 8, such as 3.5,4"),
        (
            ["31B", "--bits", "4", "--head-bits", "9"],
            "--head-bits 9: expected numbers from 1 to 8 or 16, such",
        ),
        (["31B", "--bits", "nan"], "--bits nan: expected numbers from 1 to 8, such as 3.5,4"),
        (["31B", "--bits", "3,4,5", "--head-bits", "6,8"], "--head-bits 6,8: got 2 values, expected 1 or 3, as --bits"),
        ([SMALL / "dense", "--bits", "4"], f"--bits 4: expected nothing: {SMALL / 'dense'} has a format"),
        (["31B", "--vram", "much"], "size 'much': expected a positive number with a unit, such as 5GB or 500MiB"),
        (
            ["31B", "--gpu-memory-utilization", "1.5"],
            "--gpu-memory-utilization 1.5: expected more than 0 and at most 1",
        ),
        (["31B", "--plot", "/nowhere/at/all.png"], "/nowhere/at/all.png: cannot be written: No such file or directory"),
    ],
    ids=lambda value: " ".join(map(str, value))[-40:] if isinstance(value, list) else "",
)
def test_refusals_are_one_line(vram, arguments, message):
    code, out, err = vram(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_configuration_without_a_window(vram, tmp_path):
    folder = write_checkpoint(tmp_path / "model", small_config())
    code, _, err = vram(folder)
    assert (code, err) == (2, "error: config.json: sliding_window is None, expected a positive integer\n")


def test_gguf_refusals(vram, gguf_file):
    path = gguf_file("model", False)
    assert vram(path, "--kv-dtype", "fp8")[2] == (
        "error: --kv-dtype fp8: expected auto, fp16 or bf16 for llama.cpp, which has no FP8 cache\n"
    )
    assert vram(path, "--engine", "vllm")[2] == (
        f"error: {path}: got a GGUF file, which vLLM does not load for Gemma 4\n"
    )
    other = gguf_file("other", False, arch="llama")
    assert vram(other)[2] == "error: other.gguf: general.architecture: got 'llama', expected 'gemma4'\n"
    short = gguf_file("short", False, block_count=5)
    assert vram(short)[2].startswith("error: short.gguf: gemma4.attention.head_count_kv: got (2, 2, 1, 2), expected 5")
