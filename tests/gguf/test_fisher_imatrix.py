"""Importance matrices weighed by Fisher information: what changes, what stays, and that errors fall."""

import json

import numpy as np
import pytest
from gemma4q_kernels.ggml import GGMLQuantizationType
from typer.testing import CliRunner

from gguf_mixed.cli import app
from gguf_mixed.errors import InputError
from gguf_mixed.fisher import Fisher, Marginals, write_fisher
from gguf_mixed.fisher_imatrix import weigh_imatrix
from gguf_mixed.imatrix import Imatrix, ImatrixEntry
from gguf_mixed.imatrix_gguf import read_imatrix, write_imatrix

EXPERTS, QUERY = "blk.0.ffn_down_exps.weight", "blk.0.attn_q.weight"


def entry(sums, counts):
    return ImatrixEntry(np.array(sums, np.float32), np.array(counts, np.int64))


def imatrix():
    return Imatrix(
        {EXPERTS: entry([[2, 6], [1, 1], [0, 0]], [2, 1, 0]), QUERY: entry([[4, 4]], [4])}, ("text",), 1, 128
    )


def fisher(columns=((3, 1), (0, 0), (5, 1))):
    return Fisher({EXPERTS: Marginals(np.ones((3, 2), np.float32), np.array(columns, np.float32))}, 10)


def test_weights_move_between_channels_and_keep_their_mean():
    weighed, unchanged = weigh_imatrix(imatrix(), fisher())
    found = weighed.entries[EXPERTS]
    # Mean 4, shares 1.5 and 0.5 of it; a twentieth of what was there stays.
    assert np.allclose(found.sums[0], [0.95 * 6 + 0.05 * 2, 0.95 * 2 + 0.05 * 6])
    assert np.isclose(found.sums[0].sum(), 8)
    assert np.array_equal(found.sums[1:], [[1, 1], [0, 0]])  # the one without Fisher data, the other without text
    assert np.array_equal(found.counts, [2, 1, 0])
    assert unchanged == (QUERY,) and weighed.entries[QUERY] == imatrix().entries[QUERY]


def test_another_shape_is_left_alone():
    weighed, unchanged = weigh_imatrix(imatrix(), fisher(((1, 2, 3),) * 3))
    assert weighed == imatrix() and unchanged == (EXPERTS, QUERY)


def test_weighted_errors_fall(quantizers):
    """Channels that matter are not those with most energy: the quantizer has to be told."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((64, 256)).astype(np.float32)
    columns = generator.lognormal(0, 1.5, (1, 256)).astype(np.float32)
    source = Imatrix({QUERY: entry(generator.lognormal(0, 1.5, (1, 256)), [1])}, ("text",), 1, 128)
    weighed, _ = weigh_imatrix(source, Fisher({QUERY: Marginals(np.ones((1, 64), np.float32), columns)}, 1))

    def error(matrix):
        stored = quantizers.round_trip(rows, GGMLQuantizationType.Q4_K, matrix.entries[QUERY].weights[0])
        return float(((stored - rows) ** 2 @ columns[0]).sum())

    assert error(weighed) < 0.8 * error(source)


def test_command(tmp_path):
    write_imatrix(imatrix(), tmp_path / "i.gguf")
    write_fisher(tmp_path / "f.safetensors", fisher())
    arguments = ["weigh-imatrix", str(tmp_path / "i.gguf"), str(tmp_path / "f.safetensors"), "-o"]
    finished = CliRunner().invoke(app, [*arguments, str(tmp_path / "w.gguf")])
    assert "1 entries weighed, 1 as they were (blk.0.attn_q.weight)" in finished.output
    assert read_imatrix(tmp_path / "w.gguf") == weigh_imatrix(imatrix(), fisher())[0]
    report = json.loads(CliRunner().invoke(app, [*arguments, str(tmp_path / "w.gguf"), "--json"]).output)
    assert report == {"output": str(tmp_path / "w.gguf"), "weighed": 1, "unchanged": ["blk.0.attn_q.weight"]}
    write_fisher(tmp_path / "f.safetensors", Fisher({}, 10))
    with pytest.raises(InputError, match="f.safetensors: of another model"):
        CliRunner().invoke(app, [*arguments, str(tmp_path / "x.gguf")], catch_exceptions=False)
    assert not (tmp_path / "x.gguf").exists()
