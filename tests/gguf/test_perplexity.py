"""llama-perplexity as it is run, on the small trained Gemma 4: what it measures, and what is refused."""

import shutil
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import tolerances
from gguf_files import gemma4_metadata, small_moe, write_gguf
from small_models import CHUNKS, CONTEXT, POSITIONS, quantize

from gguf_mixed.errors import InputError
from gguf_mixed.llama_cpp import error_line, find_tool, run_tool
from gguf_mixed.perplexity import Base, base_bytes, divergence, parse_divergence, read_base, write_base
from gguf_mixed.tensors import read_inventory

TINY = Base(Path("base"), context=CONTEXT, vocabulary=1024, chunks=1)


@pytest.fixture(scope="module")
def tool(llama_quantize):
    return find_tool("llama-perplexity")


@pytest.fixture(scope="module")
def base(tool, small_gguf, held_out_text, tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "dense.kld"
    return write_base(tool, small_gguf("dense"), held_out_text, path, chunks=CHUNKS, context=CONTEXT, threads=1)


def measure(tool, model, base, log=lambda line: None):
    return divergence(tool, model, base.path, threads=1, log=log)


def test_the_base_is_what_its_header_says(base):
    assert read_base(base.path) == base
    assert (base.context, base.chunks, base.vocabulary) == (CONTEXT, CHUNKS, 1024)
    assert base.positions == POSITIONS == CHUNKS * (CONTEXT // 2 - 1)
    assert base.path.stat().st_size == base_bytes(1024, CHUNKS, CONTEXT)
    assert [path.name for path in base.path.parent.iterdir()] == ["dense.kld"]


def test_size_of_a_chunk_at_the_vocabulary_of_gemma():
    assert base_bytes(262144, 1) == 20 + 4 * 512 + 255 * (2 * 262144 + 8)


def test_a_model_does_not_diverge_from_itself(tool, base, small_gguf):
    found = measure(tool, small_gguf("dense"), base)
    assert abs(found.mean_kld) < tolerances.SELF_KLD_MEAN
    assert found.max_kld < tolerances.SELF_KLD_MAX
    assert (found.same_top, found.same_top_error) == (1.0, 0.0)
    assert (found.chunks, found.positions) == (CHUNKS, POSITIONS)
    assert found.perplexity_ratio == pytest.approx(found.perplexity / found.base_perplexity, abs=1e-5)


def test_a_scaled_tensor_breaks_the_bounds(tool, base, small_gguf, tmp_path):
    path = Path(shutil.copy(small_gguf("dense"), tmp_path))
    tensor = read_inventory(path).tensors["blk.0.ffn_gate.weight"]  # of most others, a norm takes out the scale
    weights = np.memmap(path, "<f4", "r+", tensor.start, (tensor.n_elements,))
    weights *= 1.1
    weights.flush()
    found = measure(tool, path, base)
    assert found.mean_kld > tolerances.SELF_KLD_MEAN
    assert found.max_kld > tolerances.SELF_KLD_MAX


def test_fewer_bits_diverge_more(llama_quantize, tool, base, small_gguf, tmp_path):
    model = Path(shutil.copy(small_gguf("dense"), tmp_path))
    found = [measure(tool, quantize(llama_quantize, model, qtype), base) for qtype in ("Q8_0", "Q4_0", "Q2_K")]
    best, middle, worst = found
    for name in ("mean_kld", "median_kld", "p90_kld", "p99_kld"):
        assert 0 < getattr(best, name) < getattr(middle, name) < getattr(worst, name)
    assert 1 > best.same_top > middle.same_top > worst.same_top > 0.3
    assert worst.perplexity > best.perplexity
    for each in found:
        assert each.median_kld < each.p90_kld < each.p95_kld < each.p99_kld < each.p999_kld < each.max_kld
        assert 0 < each.mean_kld_error < each.mean_kld
        assert 0 < each.same_top_error < 0.05


def test_progress_is_passed_on_and_figures_are_read_strictly(tool, base, small_gguf):
    lines = []
    found = measure(tool, small_gguf("dense"), base, lines.append)
    assert parse_divergence(lines, base) == found
    assert sum("%" in line and line.strip().startswith(str(CHUNKS)) for line in lines) == 1  # the last chunk's row
    labels = ("Mean    KLD", "Maximum KLD", "Median  KLD", "99.0%   KLD", "Same top p", "Mean PPL(Q) ")
    for label in labels:
        (index,) = (index for index, line in enumerate(lines) if line.startswith(label))
        name = " ".join(label.split()).replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(InputError, match=rf"printed no '{name}"):
            parse_divergence(lines[:index] + lines[index + 1 :], base)
        broken = lines[index].partition(":")[0] + ":        nan" + (" ± nan" if "±" in lines[index] else "")
        with pytest.raises(InputError, match=rf"{name} is nan, expected a finite number"):
            parse_divergence([*lines[:index], broken, *lines[index + 1 :]], base)
    without_last = [line for line in lines if not line.strip().startswith(f"{CHUNKS} ")]
    with pytest.raises(InputError, match=f"compared {CHUNKS - 1} chunks, expected {CHUNKS}"):
        parse_divergence(without_last, base)
    assert all(value == value for value in astuple(found))


def test_nothing_printed_is_refused():
    with pytest.raises(InputError, match="compared 0 chunks, expected 1: no output"):
        parse_divergence([], TINY)


def test_another_vocabulary_is_refused(tool, base, tmp_path):
    other = write_gguf(tmp_path / "other.gguf", small_moe())
    with pytest.raises(InputError, match=r"dense.kld: vocabulary of 1024, other.gguf has 96"):
        measure(tool, other, base)


def test_a_model_that_cannot_be_loaded_is_named_by_the_tool(tool, base, tmp_path):
    listed = [
        (name, (256, 1024) if name == "token_embd.weight" else shape, qtype) for name, shape, qtype in small_moe()
    ]
    broken = write_gguf(tmp_path / "broken.gguf", listed, gemma4_metadata(2, 256, 256))
    with pytest.raises(InputError, match=r"llama-perplexity: exit 1: .*(load|error)"):
        measure(tool, broken, base)


@pytest.mark.parametrize("cut", [1, 100_000])
def test_a_truncated_base_is_refused(base, tmp_path, cut):
    path = tmp_path / "cut.kld"
    path.write_bytes(base.path.read_bytes()[:-cut])
    with pytest.raises(InputError, match=rf"cut.kld: [\d,]+ bytes, expected {base.path.stat().st_size:,}"):
        read_base(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"The language reference", "not a base file of llama-perplexity"),
        (b"_logits_\x80\0\0\0", "holds no logits"),
        (b"_logits_" + bytes(12), "0 chunks of 0 tokens"),
        (b"", "not a base file"),
    ],
)
def test_another_file_is_no_base(tmp_path, content, reason):
    path = tmp_path / "some.kld"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"some.kld: {reason}"):
        read_base(path)


def test_a_missing_base_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none.kld: cannot be read: No such file"):
        read_base(tmp_path / "none.kld")


@pytest.mark.parametrize(
    ("characters", "chunks", "reason"),
    [(300, 2, "no base of text.txt: "), (3000, 500, r"text.txt: too small: \d+ chunks of 128 tokens, asked were 500")],
)
def test_too_small_a_text(tool, small_gguf, held_out_text, tmp_path, characters, chunks, reason):
    text = tmp_path / "text.txt"
    text.write_text(held_out_text.read_text()[:characters])
    with pytest.raises(InputError, match=reason):
        write_base(tool, small_gguf("dense"), text, tmp_path / "b.kld", chunks=chunks, context=CONTEXT, threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_too_few_positions(small_gguf, tool, held_out_text, tmp_path):
    with pytest.raises(InputError, match="1 chunks of 128 tokens: at least 100 positions are needed"):
        write_base(tool, small_gguf("dense"), held_out_text, tmp_path / "b.kld", chunks=1, context=CONTEXT)


def test_an_interrupted_run_leaves_nothing(tool, small_gguf, held_out_text, tmp_path):
    def interrupt(line):
        if "calculating perplexity" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_base(
            tool, small_gguf("dense"), held_out_text, tmp_path / "b.kld", chunks=40, context=CONTEXT, log=interrupt
        )
    assert not list(tmp_path.iterdir())


def test_a_killed_program_is_told_from_a_failed_one(tmp_path):
    with pytest.raises(InputError, match="^sh: killed by SIGSEGV: no output$"):
        run_tool(["/bin/sh", "-c", "kill -SEGV $$"], print)
    with pytest.raises(InputError, match="^sh: exit 3: it failed here$"):
        run_tool(["/bin/sh", "-c", "echo one; echo it failed here >&2; echo two; exit 3"], print)
    with pytest.raises(InputError, match="^no-such: does not run: "):
        run_tool([str(tmp_path / "no-such")], print)


def test_the_error_of_a_log():
    stamped = ["0.00.001.000 I load: no errors", "0.00.001.001 E load: broken", "0.00.001.002 E load: failed"]
    assert error_line(stamped) == "load: broken"
    assert error_line(["llama_model_loader: - kv 1: failed", "fine", "aborting"]) == "aborting"
    assert error_line(["fine"]) is None


def test_no_error_of_a_ratio_to_itself(tool, base, small_gguf):
    """Two nearly equal variances: what is left of them may be negative, and its root not a number."""
    lines = []
    found = measure(tool, small_gguf("dense"), base, lines.append)
    (index,) = (index for index, line in enumerate(lines) if line.startswith("Mean PPL(Q)/PPL(base)"))
    lines[index] = lines[index].partition("±")[0] + "±       -nan"
    assert parse_divergence(lines, base).perplexity_ratio_error == 0
    lines[index] = lines[index].replace(f"{found.perplexity_ratio:.6f}", "nan")
    with pytest.raises(InputError, match="is nan, expected a finite number"):
        parse_divergence(lines, base)
