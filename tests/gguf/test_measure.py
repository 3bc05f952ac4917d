"""The measured error table: against sums made another way, sampling, the cache, and refusals."""

import contextlib
import json

import numpy as np
import pytest
from gemma4q_kernels.ggml import GGMLQuantizationType
from gguf import quants
from gguf_files import BF16, F32, small_moe, write_gguf
from llama_quantize import imatrix_of
from tolerances import SAMPLED_ERROR_MEAN, SAMPLED_ERROR_RMS, SLOW_TYPE_ERROR, WEIGHTED_ERROR

from gguf_mixed.error_cache import ErrorCache
from gguf_mixed.errors import InputError
from gguf_mixed.imatrix import Imatrix, ImatrixEntry
from gguf_mixed.measure import Sampling, load_quantizers, measure
from gguf_mixed.rows import read_rows, sampled_rows
from gguf_mixed.sensitivity import Anchor, Sensitivity, TensorSensitivity, role_prior, uniform
from gguf_mixed.tensors import read_inventory

T = GGMLQuantizationType
EVERY_ROW = Sampling(4096)
EXPERTS, PLAIN = "blk.0.ffn_down_exps.weight", "blk.0.attn_k.weight"
MANY = "blk.0.ffn_up.weight"


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    listed = [entry for entry in small_moe() if "attn_output" not in entry[0]]  # its rows of 100 fit no type of 4 bits
    return read_inventory(write_gguf(tmp_path_factory.mktemp("moe") / "m.gguf", listed, random_weights=True))


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory):
    """One tensor of 4096 rows whose sizes differ."""
    path = tmp_path_factory.mktemp("many") / "m.gguf"
    inventory = read_inventory(write_gguf(path, [(MANY, (256, 4096), F32)], random_weights=True))
    stored = np.memmap(path, np.float32, "r+", inventory.tensors[MANY].start, (4096, 256))
    stored *= np.exp(0.5 * np.random.default_rng(5).standard_normal((4096, 1))).astype(np.float32)
    stored.flush()
    return inventory


def values_of(tensor):
    return read_rows(tensor, np.arange(tensor.n_elements // tensor.row_length))


def of_marginals(rows=None, columns=None, anchor=None):
    return Sensitivity("test", True, lambda tensor: TensorSensitivity(rows, columns, anchor))


def error_at(table, tensor, qtype):
    return next(row.error for row in table.by_tensor[tensor] if row.qtype is qtype)


def test_rows_are_read_as_the_package_reads_them(tmp_path):
    listed = [(f"blk.{i}.x.weight", (64, 6), qtype) for i, qtype in enumerate((BF16, F32, T.F16))]
    path = write_gguf(tmp_path / "m.gguf", listed[:2], random_weights=True)
    for tensor in read_inventory(path).tensors.values():
        raw = np.fromfile(path, np.uint8, tensor.n_bytes, offset=tensor.start).reshape(6, -1)
        assert np.array_equal(values_of(tensor), quants.dequantize(raw, tensor.qtype))
        assert np.array_equal(read_rows(tensor, np.array([4, 1])), values_of(tensor)[[4, 1]])


def test_half_floats_are_read(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", [(PLAIN, (64, 4), T.F16)])
    tensor = read_inventory(path).tensors[PLAIN]
    expected = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float16)
    np.memmap(path, np.float16, "r+", tensor.start, (4, 64))[:] = expected
    assert np.array_equal(values_of(tensor), expected.astype(np.float32))


def test_every_row_is_drawn_where_there_are_few():
    rows, counts = sampled_rows(np.arange(5.0), 5, np.random.default_rng(0))
    assert rows.tolist() == [0, 1, 2, 3, 4] and counts.tolist() == [1] * 5


def test_draws_follow_the_weights_and_never_take_a_row_of_none():
    weights = np.tile([0.0, 1.0, 3.0], 40)
    drawn = [sampled_rows(weights, 12, np.random.default_rng(seed)) for seed in range(400)]
    assert all((weights[rows] > 0).all() and (np.diff(rows) > 0).all() for rows, _ in drawn)
    share = sum((weights[rows] == 3).sum() for rows, _ in drawn) / sum(len(rows) for rows, _ in drawn)
    assert 0.7 < share < 0.8
    # One row a part of equal weight: the weighted sum of the weights themselves is exact.
    assert all(np.isclose((counts * weights[rows]).sum(), weights.sum()) for rows, counts in drawn)


@pytest.mark.parametrize("scale", [1, 1.1])
def test_error_is_the_weighted_sum_over_experts_rows_and_columns(quantizers, moe, scale):
    tensor = moe.tensors[EXPERTS]
    generator = np.random.default_rng(2)
    rows = generator.random((3, 8), dtype=np.float32)
    columns = generator.random((3, 704), dtype=np.float32)
    only = Sensitivity(
        "test", True, lambda found: TensorSensitivity(rows, columns) if found is tensor else TensorSensitivity()
    )
    found = error_at(measure(moe, quantizers, only, types=[T.Q8_0]), EXPERTS, T.Q8_0)
    values = values_of(tensor)
    stored = quants.dequantize(quants.quantize(values, T.Q8_0), T.Q8_0)
    squares = ((stored - values).astype(np.float64) ** 2).reshape(3, 8, 704)
    expected = scale * np.einsum("erc,er,ec->", squares, rows.astype(float), columns.astype(float))
    assert bool(abs(found / expected - 1) < WEIGHTED_ERROR) is (scale == 1)


def test_each_expert_is_quantized_with_its_own_imatrix(quantizers, moe):
    generator = np.random.default_rng(3)
    sums = np.exp(3 * generator.standard_normal((3, 704))).astype(np.float32)
    imatrix = Imatrix({EXPERTS: ImatrixEntry(sums, np.array([1, 2, 0]))})
    found = error_at(measure(moe, quantizers, uniform(), imatrix, [T.IQ4_NL]), EXPERTS, T.IQ4_NL)
    values = values_of(moe.tensors[EXPERTS]).reshape(3, 8, 704)
    weights = np.stack([sums[0], sums[1] / 2, np.ones(704, np.float32)])
    expected = 0.0
    for matrix, column in zip(values, weights, strict=True):
        difference = quantizers.round_trip(matrix, T.IQ4_NL, column) - matrix
        expected += float((difference.astype(np.float64) ** 2 * column).sum())
    assert abs(found / expected - 1) < WEIGHTED_ERROR


def test_table_holds_every_legal_type_with_exact_bytes(quantizers, moe):
    table = measure(moe, quantizers, uniform(), imatrix_of(moe))
    for name, tensor in moe.tensors.items():
        rows = table.by_tensor.get(name, ())
        assert tuple(row.qtype for row in rows) == (() if tensor.kept_because else tensor.legal_types)
        assert all(row.n_bytes == tensor.bytes_as(row.qtype) for row in rows)
    without = measure(moe, quantizers, uniform())
    types = {row.qtype.name for row in without.by_tensor["blk.0.ffn_up.weight"]}
    assert "IQ3_S" in types and not types & {"IQ1_S", "IQ2_XXS", "IQ2_S", "IQ3_XXS"}


def test_imatrix_lowers_the_error_it_is_measured_in(quantizers, moe):
    columns = np.exp(2 * np.random.default_rng(4).standard_normal((1, 256))).astype(np.float32)
    name = "blk.0.ffn_up.weight"
    imatrix = Imatrix({name: ImatrixEntry(columns, np.array([1]))})
    only = Sensitivity("test", True, lambda tensor: TensorSensitivity(columns=columns if tensor.name == name else None))
    types = [T.IQ4_NL, T.Q4_K, T.Q8_0]
    better, worse = (measure(moe, quantizers, only, given, types) for given in (imatrix, None))
    for qtype in (T.IQ4_NL, T.Q4_K):
        assert error_at(better, name, qtype) < 0.9 * error_at(worse, name, qtype)


def test_sampled_error_is_near_that_of_all_rows(quantizers, many_rows):
    def deviations(sensitivity):
        errors = [
            error_at(measure(many_rows, quantizers, sensitivity, types=[T.Q8_0], sampling=sampling), MANY, T.Q8_0)
            for sampling in [Sampling(4096), *(Sampling(256, seed) for seed in range(24))]
        ]
        return np.array(errors[1:]) / errors[0]

    ratios = deviations(uniform())
    assert np.sqrt(np.mean((ratios - 1) ** 2)) < SAMPLED_ERROR_RMS
    assert abs(ratios.mean() - 1) < SAMPLED_ERROR_MEAN
    assert abs(1.1 * ratios.mean() - 1) > SAMPLED_ERROR_MEAN
    # Rows whose sensitivities differ this much would be off by a third if they were not drawn by them.
    rows = np.exp(1.5 * np.random.default_rng(6).standard_normal((1, 4096))).astype(np.float32)
    assert np.sqrt(np.mean((deviations(of_marginals(rows=rows)) - 1) ** 2)) < SAMPLED_ERROR_RMS


def test_threads_change_nothing(quantizers, moe):
    types = [T.Q5_0, T.IQ4_NL]
    one, two = (measure(moe, quantizers, uniform(), types=types, threads=threads) for threads in (1, 2))
    assert one == two


def test_an_interrupted_run_is_resumed(quantizers, moe, tmp_path, monkeypatch):
    cache, types = tmp_path / "errors.jsonl", [T.Q4_0, T.Q8_0]
    expected = measure(moe, quantizers, role_prior(moe), types=types, cache=cache, sampling=EVERY_ROW)
    whole = cache.read_text()
    lines = whole.splitlines(keepends=True)
    cache.write_text("".join(lines[:4]) + lines[4][:40])
    assert measure(moe, quantizers, role_prior(moe), types=types, cache=cache, sampling=EVERY_ROW) == expected
    assert cache.read_text() == whole
    # A cached sum is used, not measured again: one that was changed by hand shows.
    entry = json.loads(lines[1])
    entry["sums"]["Q8_0"] = 0.0
    cache.write_text("".join([lines[0], json.dumps(entry) + "\n", *lines[2:]]))
    changed = measure(moe, quantizers, role_prior(moe), types=types, cache=cache, sampling=EVERY_ROW)
    assert error_at(changed, entry["tensor"], T.Q8_0) == 0
    # Further types are added to it; other rows are measured apart.
    measure(moe, quantizers, role_prior(moe), types=[*types, T.Q5_0], cache=cache, sampling=EVERY_ROW)
    assert json.loads(cache.read_text().splitlines()[-1])["sums"].keys() == {"energy", "Q4_0", "Q8_0", "Q5_0"}
    fresh = measure(moe, quantizers, role_prior(moe), types=types, cache=cache, sampling=Sampling(4096, seed=1))
    assert fresh == expected


def test_slow_types_are_measured_on_a_quarter_of_the_rows(quantizers, many_rows):
    """As a multiple of Q4_K's error: near to all rows, and exactly what those rows say."""
    types = [T.IQ4_XS, T.Q4_K]
    whole, drawn = (measure(many_rows, quantizers, uniform(), types=types, sampling=s) for s in (EVERY_ROW, Sampling()))
    ratios = [error_at(table, MANY, T.IQ4_XS) / error_at(table, MANY, T.Q4_K) for table in (whole, drawn)]
    assert abs(ratios[1] / ratios[0] - 1) < SLOW_TYPE_ERROR
    # The reference is measured where it is not asked for, and comes to the same.
    alone = measure(many_rows, quantizers, uniform(), types=[T.IQ4_XS])
    assert error_at(alone, MANY, T.IQ4_XS) == error_at(drawn, MANY, T.IQ4_XS)


def test_anchor_scales_a_tensor_to_what_was_measured(quantizers, moe):
    table = measure(moe, quantizers, of_marginals(anchor=Anchor(0.25, T.Q4_0)), types=[T.Q4_0, T.Q8_0])
    assert error_at(table, PLAIN, T.Q4_0) == 0.25
    assert 0 < error_at(table, PLAIN, T.Q8_0) < 0.01
    outside = measure(moe, quantizers, of_marginals(anchor=Anchor(0.25, T.Q4_0)), types=[T.Q8_0])
    assert error_at(outside, PLAIN, T.Q8_0) == error_at(table, PLAIN, T.Q8_0)
    # Rows of 704 fall back, so what was measured there as Q4_K was Q5_0.
    fallen = measure(moe, quantizers, of_marginals(anchor=Anchor(0.25, T.Q4_K)), types=[T.Q5_0])
    assert error_at(fallen, EXPERTS, T.Q5_0) == 0.25


def refusal(quantizers, inventory, sensitivity=None, **arguments):
    with pytest.raises(InputError) as raised:
        measure(inventory, quantizers, sensitivity or uniform(), **arguments)
    return str(raised.value)


def test_refusals(quantizers, moe, tmp_path):
    empty = read_inventory(write_gguf(tmp_path / "q.gguf", [(PLAIN, (256, 8), T.Q8_0)]))
    assert "is Q8_0, expected F32, F16 or BF16" in refusal(quantizers, empty)
    path = write_gguf(tmp_path / "h.gguf", [(PLAIN, (256, 8), BF16)])
    header = path.read_bytes()[: read_inventory(path).headers[0].data_start]
    path.write_bytes(header)
    assert "holds no weights" in refusal(quantizers, read_inventory(path))
    other = Imatrix({"blk.9.x.weight": ImatrixEntry(np.ones((1, 4), np.float32), np.array([1]))})
    assert "imatrix is of another model" in refusal(quantizers, moe, imatrix=other)
    assert "got rows [1, 5]" in refusal(quantizers, moe, of_marginals(rows=np.ones((1, 5), np.float32)))
    assert "none of the types" in refusal(quantizers, moe, types=[T.Q1_0])
    (tmp_path / "c").write_text("something of the user's\n")
    assert "is not a cache" in refusal(quantizers, moe, cache=tmp_path / "c")
    assert (tmp_path / "c").read_text() == "something of the user's\n"
    zeros = read_inventory(write_gguf(tmp_path / "z.gguf", [(PLAIN, (256, 8), F32)]))
    np.memmap(zeros.path, np.float32, "r+", zeros.tensors[PLAIN].start, (2048,))[9] = np.nan
    assert f"tensor {PLAIN}: rows hold values that are not finite" in refusal(quantizers, zeros)


def test_a_named_folder_without_the_library_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"not in {tmp_path}$"):
        load_quantizers(tmp_path)


def test_a_damaged_cache_is_refused(tmp_path):
    path = tmp_path / "errors.jsonl"
    ErrorCache(path).add("a", "1", {"Q8_0": 0.5})
    with contextlib.closing(ErrorCache(path)) as cache:
        assert cache.get("a", "1") == {"Q8_0": 0.5} and cache.get("a", "2") == {}
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(InputError, match="damaged: b'{}'; remove it"):
        ErrorCache(path)


def test_an_anchor_that_needs_an_imatrix_where_there_is_none(quantizers, moe):
    """As in an imatrix of blocks alone: the divergence was measured with one, and anchors the tensor all the same."""
    of = of_marginals(anchor=Anchor(0.25, T.IQ2_XXS))
    table = measure(moe, quantizers, of, types=[T.Q4_0, T.Q8_0])
    embeddings = "token_embd.weight"
    assert moe.tensors[embeddings].requires_imatrix(T.IQ2_XXS)
    assert 0 < error_at(table, embeddings, T.Q8_0) < error_at(table, embeddings, T.Q4_0) < 0.25


def test_other_experts_are_other_weights(quantizers, tmp_path):
    """Of one shape under one name, with the same first expert: as after two prunes to as many."""
    listed = [(EXPERTS, (256, 512, 3), F32)]
    path, cache = write_gguf(tmp_path / "m.gguf", listed, random_weights=True), tmp_path / "errors.jsonl"
    inventory = read_inventory(path)
    measure(inventory, quantizers, uniform(), types=[T.Q4_0], cache=cache)
    tensor = inventory.tensors[EXPERTS]
    stored = np.memmap(path, np.float32, "r+", tensor.start, (3, 512, 256))
    stored[2] *= 2
    stored.flush()
    again = measure(inventory, quantizers, uniform(), types=[T.Q4_0], cache=cache)
    assert again == measure(inventory, quantizers, uniform(), types=[T.Q4_0])
