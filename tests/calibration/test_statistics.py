"""Statistics files: written and read back, refused when damaged or of another model."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vllm_gemma4q.calibration.statistics import (
    N_BINS,
    Inputs,
    Routing,
    as_arrays,
    histogram_edges,
    metadata,
    read_statistics,
    write_statistics,
)
from vllm_gemma4q.errors import InputError

Q, K, GATE_UP = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.experts.gate_up"
EXPERTS = "model.layers.0.experts"


def inputs(n=1, width=4, seed=0):
    random = np.random.default_rng(seed)
    absmax, total, squares = random.random((3, n, width))
    count = random.integers(1, 9, n)
    return Inputs(absmax.astype(np.float32), total, squares, count, random.integers(0, 9, (n, N_BINS)))


def routing(n=3, samples=2):
    random = np.random.default_rng(1)
    shapes = [(n,)] * 8 + [(samples, n)] * 2
    return Routing(*(random.integers(0, 9, shape) for shape in shapes))


@pytest.fixture
def file(tmp_path):
    arrays = as_arrays(Q, inputs(), np.eye(4)) | as_arrays(GATE_UP, inputs(3, seed=1)) | as_arrays(EXPERTS, routing())
    arrays |= {"samples.text": np.array([0, 0], np.int32), "samples.tokens": np.array([5, 6], np.int32)}
    path = tmp_path / "statistics.safetensors"
    write_statistics(path, arrays, {Q: Q, K: Q, GATE_UP: GATE_UP}, {"samples": 2, "texts": [{"name": "a.txt"}]})
    return path


def same(got, expected):
    return all(np.array_equal(getattr(got, name), getattr(expected, name)) for name in vars(expected))


def test_round_trip(file):
    found = read_statistics(file)
    assert found.modules == (Q, K, GATE_UP)
    assert found.experts == (EXPERTS,)
    assert found.details == {"samples": 2, "texts": [{"name": "a.txt"}]}
    assert same(found.inputs(Q), inputs())
    assert same(found.inputs(K), inputs())
    assert same(found.inputs(GATE_UP), inputs(3, seed=1))
    assert same(found.routing(EXPERTS), routing())
    assert np.array_equal(found.hessian(K), np.eye(4))
    assert found.hessian(GATE_UP) is None
    assert [array.tolist() for array in found.samples()] == [[0, 0], [5, 6]]
    assert not list(file.parent.glob("*.partial"))


def test_second_moment_of_what_was_never_seen_is_zero():
    never = inputs(2)
    never.sum_squares[1], never.count[1] = 0, 0
    assert np.array_equal(never.second_moment[0], never.sum_squares[0] / never.count[0])
    assert (never.second_moment[1] == 0).all()


def test_edges_are_eight_an_octave():
    edges = histogram_edges()
    assert len(edges) == N_BINS - 1
    assert (edges[0], edges[-1]) == (2.0**-24, 2.0**16)
    assert np.array_equal(edges[8::8], 2 * edges[:-8:8])
    assert np.allclose(np.diff(edges[:9]), 2.0**-27)


def test_files_of_another_model_or_kind(file, tmp_path):
    with pytest.raises(InputError, match=r"statistics of another model: nothing for model.layers.9.mlp.up_proj"):
        read_statistics(file).inputs("model.layers.9.mlp.up_proj")
    with pytest.raises(InputError, match=r"statistics of another model: no routing of model.layers.9.experts"):
        read_statistics(file).routing("model.layers.9.experts")
    other = tmp_path / "other.safetensors"
    save_file({"x": np.zeros(1)}, other)
    with pytest.raises(InputError, match=r"other.safetensors: got format None, expected gemma4q statistics 1"):
        read_statistics(other)
    other.write_text("no")
    with pytest.raises(InputError, match=r"other.safetensors: cannot be read as a statistics file"):
        read_statistics(other)
    with pytest.raises(InputError, match=r"absent: cannot be read as a statistics file"):
        read_statistics(tmp_path / "absent")


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        (f"{Q}.input_sum", None, "tensor .*q_proj.input_sum: missing"),
        (f"{Q}.input_sum", np.zeros((1, 3)), "got shapes"),
        (f"{Q}.input_sum", np.full((1, 4), np.nan), "not finite"),
        (f"{Q}.input_sum", np.zeros((1, 4), np.float32), "got float32, expected float64"),
    ],
)
def test_damaged_sets(file, tensor, value, message):
    arrays = load_file(file)
    arrays = {name: array for name, array in arrays.items() if name != tensor}
    save_file(arrays if value is None else {**arrays, tensor: value}, file, metadata({Q: Q}, {}))
    with pytest.raises(InputError, match=message):
        read_statistics(file).inputs(Q)


def test_truncated(file):
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"statistics.safetensors: cannot be read as a statistics file"):
        read_statistics(file)
