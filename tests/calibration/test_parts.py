"""Parts of all samples, what their sums come to together, and Hessians of which a half is kept."""

import numpy as np
import pytest
import torch
from tolerances import CALIBRATION, rms_error

from vllm_gemma4q.calibration import experts, hessian
from vllm_gemma4q.calibration.fold import N_PARTS, divided, fold
from vllm_gemma4q.calibration.hessian import HalfHessian, Mirrored


@pytest.mark.parametrize("n_samples", [1, 5, N_PARTS, N_PARTS + 1, 512])
def test_parts_are_contiguous_and_alike(n_samples):
    parts = divided(n_samples)
    assert len(parts) == min(n_samples, N_PARTS)
    assert [number for part in parts for number in part] == list(range(n_samples))
    assert {len(part) for part in parts} <= {n_samples // len(parts), -(-n_samples // len(parts))}


def test_sums_fold_by_what_they_are():
    parts = [
        {
            "x.input_absmax": np.array([1.0, 5.0]) * sign,
            "x.input_sum": np.array([1.0, 2.0]),
            "e.norm_max": np.array([3.0 * sign]),
            "e.sample_count": np.array([[index, 1]]),
        }
        for index, sign in enumerate((1, -1, 2))
    ]
    total = {}
    for part in parts:
        fold(total, part)
    assert {name: array.tolist() for name, array in total.items()} == {
        "x.input_absmax": [2, 10],
        "x.input_sum": [3, 6],
        "e.norm_max": [6],
        "e.sample_count": [[0, 1], [1, 1], [2, 1]],
    }


@pytest.mark.parametrize("width", [1, 8, 21, 24])
def test_half_a_hessian_is_the_whole_one(width, monkeypatch):
    monkeypatch.setattr(hessian, "_BAND", 8)
    monkeypatch.setattr(hessian, "_ROWS", 3)
    rows = torch.randn(10, width)
    sums = HalfHessian(width, torch.device("cpu"))
    for part in rows.split(5):
        sums.add(part)
    whole = Mirrored(sums.values.numpy(), width)
    found = torch.from_numpy(np.concatenate(list(whole.blocks())))
    assert found.shape == whole.shape
    assert rms_error(found, rows.double().T @ rows.double()) < CALIBRATION
    assert len(sums.values) < 0.75 * width**2 or width <= 8


@pytest.mark.parametrize("n_rows", [1, 5, 7, 11, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_s_few_rows_do_not_depend_on_threads(n_rows, dtype):
    rows, matrix, found = torch.randn(n_rows, 64, dtype=dtype), torch.randn(128, 64, dtype=dtype), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(experts._linear(rows, matrix))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert found[0].shape == (n_rows, 128)
