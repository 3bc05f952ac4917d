"""Numbers of a streamed calibration equal those of the whole model in transformers; a corrupted layer's do not."""

import json
import shutil

import numpy as np
import pytest
import torch
from calibration_runs import calibration, small
from safetensors.torch import load_file, save_file
from tolerances import CALIBRATION, CALIBRATION_HISTOGRAM, rms_error
from whole_model import watch

from vllm_gemma4q.calibration.calibrate import calibrate
from vllm_gemma4q.calibration.statistics import N_BINS, histogram_edges, read_statistics


@pytest.fixture(scope="session")
def seen(kind, calibrated):
    run, _ = calibrated
    return watch(small(kind), run.samples.ids)


def rows_of(seen, module, n):
    """What entered each of a module's matrices, float64."""
    if module in seen.inputs:
        return [torch.cat(seen.inputs[module]).double().numpy()]
    parts = (seen.experts.get((module, expert)) for expert in range(n))
    return [np.zeros((0, 1)) if rows is None else torch.stack(rows).double().numpy() for rows in parts]


def expected(rows, width):
    """(absmax, sum, sum of squares, count, histogram) of one matrix."""
    if not len(rows):
        return np.zeros(width), np.zeros(width), np.zeros(width), 0, np.zeros(N_BINS)
    bins = np.searchsorted(histogram_edges(), np.abs(rows).ravel(), side="right")
    histogram = np.bincount(bins, minlength=N_BINS)
    return np.abs(rows).max(axis=0), rows.sum(axis=0), np.square(rows).sum(axis=0), len(rows), histogram


def deviation(found, seen, module):
    """Greatest relative deviation of a module's sums, and of its histogram."""
    n, width = found.absmax.shape
    matrices = [expected(rows, width) for rows in rows_of(seen, module, n)]
    absmax, sums, squares, counts, histograms = (np.stack(part) for part in zip(*matrices, strict=True))
    assert np.array_equal(found.count, counts)
    assert np.array_equal(found.histogram.sum(axis=1), counts * width)
    scale = np.sqrt(squares * np.maximum(counts, 1)[:, None]).sum()  # a sum may cancel
    errors = [
        rms_error(torch.from_numpy(found.absmax), torch.from_numpy(absmax)),
        rms_error(torch.from_numpy(found.sum_squares), torch.from_numpy(squares)),
        float(np.abs(found.sum - sums).sum() / scale),
    ]
    return max(errors), np.abs(found.histogram - histograms).sum() / histograms.sum()


def test_inputs_of_every_linear(calibrated, seen):
    _, statistics = calibrated
    fused = {module for module, _ in seen.experts}
    assert set(statistics.modules) == set(seen.inputs) | fused
    for module in statistics.modules:
        sums, histogram = deviation(statistics.inputs(module), seen, module)
        assert sums < CALIBRATION, module
        assert histogram < CALIBRATION_HISTOGRAM, module


def test_hessians(calibrated, seen):
    _, statistics = calibrated
    for module in statistics.modules:
        rows = np.concatenate([rows for rows in rows_of(seen, module, 64) if len(rows)])
        expected = torch.from_numpy(rows.T @ rows)
        assert rms_error(torch.from_numpy(statistics.hessian(module)), expected) < CALIBRATION, module


def test_routing(calibrated, seen):
    _, statistics = calibrated
    assert set(statistics.experts) == set(seen.routed)
    for name, samples in seen.routed.items():
        found, n_experts = statistics.routing(name), samples[0][0].shape[1]
        expected = {field: np.zeros(n_experts) for field in vars(found)}
        expected["sample_count"] = np.zeros((len(samples), n_experts))
        expected["sample_gated_norm"] = np.zeros((len(samples), n_experts))
        for number, (probabilities, index, gates, norms, shares) in enumerate(samples):
            expected["probability_sum"] += probabilities.sum(dim=0).numpy()
            squared = np.zeros(n_experts)
            for expert, gate, norm, share in zip(
                index.flatten().tolist(),
                gates.flatten().tolist(),
                norms.flatten().tolist(),
                np.repeat(shares.numpy(), index.shape[1]),
                strict=True,
            ):
                expected["count"][expert] += 1
                expected["gate_sum"][expert] += gate
                expected["norm_sum"][expert] += norm
                expected["norm_square_sum"][expert] += norm**2
                expected["norm_max"][expert] = max(expected["norm_max"][expert], norm)
                expected["gated_norm_sum"][expert] += gate * norm
                expected["contribution_sum"][expert] += share * gate * norm
                expected["sample_count"][number, expert] += 1
                squared[expert] += (gate * norm) ** 2
            expected["sample_gated_norm"][number] = np.sqrt(squared)
        for field, value in expected.items():
            got = np.asarray(getattr(found, field), np.float64)
            assert rms_error(torch.from_numpy(got), torch.from_numpy(value)) < CALIBRATION, (name, field)
        inputs = statistics.inputs(f"{name}.gate_up_proj")
        assert np.array_equal(found.count, inputs.count)
        assert np.array_equal(found.count, statistics.inputs(f"{name}.down_proj").count)


def test_a_corrupted_layer_breaks_the_bound(calibrated, seen, kind, text, tmp_path):
    run, _ = calibrated
    folder = tmp_path / "corrupted"
    shutil.copytree(small(kind), folder)
    name = "model.language_model.layers.0.self_attn.o_proj.weight"
    shard = run.decoder.checkpoint.tensors[name].path.name
    weights = load_file(folder / shard)
    weights[name] *= 1.1
    save_file(weights, folder / shard, {"format": "pt"})
    calibrate(calibration(folder, text), tmp_path / "statistics", tmp_path / "work")
    statistics = read_statistics(tmp_path / "statistics")
    module = "model.language_model.layers.1.mlp.down_proj"
    sums, histogram = deviation(statistics.inputs(module), seen, module)
    assert sums > 10 * CALIBRATION
    assert histogram > 10 * CALIBRATION_HISTOGRAM


def test_experts_stored_one_by_one(text, tmp_path):
    folder, weight_map = tmp_path / "unfused", {}
    shutil.copytree(small("moe"), folder)
    for shard in folder.glob("*.safetensors"):
        weights = {}
        for name, values in load_file(shard).items():
            prefix, _, which = name.rpartition(".")
            for expert, matrix in enumerate(values if which in ("gate_up_proj", "down_proj") else ()):
                parts = zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True)
                parts = parts if which == "gate_up_proj" else [("down_proj", matrix)]
                weights |= {f"{prefix}.{expert}.{part}.weight": value.contiguous() for part, value in parts}
            if which not in ("gate_up_proj", "down_proj"):
                weights[name] = values
        save_file(weights, shard, {"format": "pt"})
        weight_map |= dict.fromkeys(weights, shard.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, source in (("unfused", folder), ("fused", "moe")):
        calibrate(calibration(source, text), tmp_path / f"{name}.safetensors", tmp_path / "work")
    fused, unfused = (load_file(tmp_path / f"{name}.safetensors") for name in ("fused", "unfused"))
    assert fused.keys() == unfused.keys()
    assert all(torch.equal(fused[name], unfused[name]) for name in fused)
