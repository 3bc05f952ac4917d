"""Judging by masked routers, layer by layer: what the whole model in transformers gives, for every candidate."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from masked_model import MaskedModel
from prune_files import EXAMPLE, N_LAYERS, NUM_EXPERTS, retained, run
from pruned_checkpoints import NON_UNIFORM, UNIFORM
from safetensors.torch import save_file
from tolerances import JUDGED, rms_error
from vllm_plugin.checkpoints import edit, load

from gguf_mixed.drop_map import RetainedExperts
from vllm_gemma4q.calibration.decoder import Decoder
from vllm_gemma4q.calibration.texts import load_samples
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.header import read_header
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.pruned_moe import judge as module
from vllm_gemma4q.pruned_moe.judge import Verdict, judge, n_steps
from vllm_gemma4q.pruned_moe.knobs import Options
from vllm_gemma4q.pruned_moe.streams import Variant

ALL = tuple(range(NUM_EXPERTS))
KEPT = {
    "uniform": UNIFORM,
    "per layer": NON_UNIFORM,
    "last layer": (ALL, ALL, UNIFORM[2]),
    "middle layer": (ALL, UNIFORM[1], ALL),
    "nothing": (ALL, ALL, ALL),
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def samples(held_out):
    ids = list(load_samples(EXAMPLE, [held_out], 4, 150).ids)
    return [*ids[:3], ids[3][:90]]  # one shorter than the others


@pytest.fixture(scope="module")
def decoder():
    return Decoder(open_checkpoint(EXAMPLE), torch.float32)


@pytest.fixture(scope="module")
def variants():
    return {name: Variant(retained(kept)) for name, kept in KEPT.items()}


@pytest.fixture(scope="module")
def verdicts(decoder, samples, variants):
    reports = []
    found = judge(decoder, samples, variants, progress=reports.append)
    assert sum(reports) == n_steps(variants, N_LAYERS, sum(map(len, samples)))
    return found


@pytest.fixture(scope="module")
def whole():
    return MaskedModel(EXAMPLE)


@pytest.fixture(scope="module")
def unpruned(whole, samples):
    return whole.run(samples)


def deviation(verdict, expected, unpruned):
    """Greatest relative deviation of what is judged."""
    kld = expected.divergence_from(unpruned)
    return max(
        rms_error(torch.tensor(verdict.kld), kld),
        rms_error(torch.tensor(verdict.layer_error), expected.layer_error(unpruned)),
    )


@pytest.mark.parametrize("name", [name for name in KEPT if name != "nothing"])
def test_equals_the_whole_model(name, verdicts, whole, samples, unpruned):
    expected, verdict = whole.run(samples, KEPT[name]), verdicts[name]
    assert deviation(verdict, expected, unpruned) < JUDGED
    assert verdict.same_top == expected.same_top(unpruned)
    assert 0 < verdict.mean == verdict.kld.mean()
    ends = np.cumsum([len(sample) for sample in samples])[:-1]
    assert np.array_equal(verdict.by_sample, [part.mean() for part in np.split(verdict.kld, ends)])
    other = [[*KEPT[name][0]], [*KEPT[name][1]], [*UNIFORM[2][:-1], 0]]  # one expert of one layer another
    assert deviation(verdict, whole.run(samples, other), unpruned) > 1000 * JUDGED


def test_layers_before_the_first_that_differs_are_not_off(verdicts):
    assert (verdicts["last layer"].layer_error[:2] == 0).all()
    assert verdicts["middle layer"].layer_error[0] == 0
    assert (verdicts["middle layer"].layer_error[1:] > 0).all()


def test_dropping_nothing_moves_nothing(verdicts):
    verdict = verdicts["nothing"]
    assert (verdict.kld == 0).all()
    assert verdict.same_top == 1
    assert (verdict.layer_error == 0).all()


def same(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in vars(one))


def open_files(folder):
    """Files of this process in a folder, nameless ones too."""
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found += str(descriptor.readlink()).startswith(str(folder))
    return found


def test_alone_as_among_others_and_spilled_as_in_memory(decoder, samples, variants, verdicts, tmp_path, monkeypatch):
    """A candidate that starts at a later layer than another is not moved by it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("last layer", "per layer"):
        alone = judge(decoder, samples, {name: variants[name]})[name]
        assert same(alone, verdicts[name])
    seen = []
    spilled = judge(decoder, samples, variants, 0, lambda tokens: seen.append(open_files(tmp_path)))
    assert all(same(spilled[name], verdicts[name]) for name in KEPT)
    assert all(seen)
    assert not list(tmp_path.iterdir())


def test_vocabulary_in_parts(decoder, samples, variants, verdicts, monkeypatch):
    """300 tokens of 1024 at a time: the sums run along, rescaled."""
    monkeypatch.setattr(module, "_VALUES_AT_ONCE", 300 * decoder.architecture.hidden_size)
    found = judge(decoder, samples, variants)
    for name in KEPT:
        assert found[name].same_top == verdicts[name].same_top
        if name != "nothing":
            assert rms_error(torch.tensor(found[name].kld), torch.tensor(verdicts[name].kld)) < JUDGED
    assert found["nothing"].kld.max() < 1e-12 < found["last layer"].mean


@pytest.mark.parametrize(
    "options",
    [Options(top_k=2), Options(shared_boost=1.5), Options(soft_transfer=0.3), Options(1.2, 0.3, 3)],
    ids=["top-k", "shared boost", "soft transfer", "all"],
)
def test_knobs_are_judged_as_the_checkpoint_that_has_them(options, samples, whole, unpruned, tmp_path):
    """With a down_proj of its own, too: experts of one layer twice as loud. In float32, so that nothing is rounded."""
    name, source = "model.language_model.layers.1.experts.down_proj", tmp_path / "float32"
    edit(EXAMPLE, source, lambda found: {name: tensor.float() for name, tensor in found.items()})
    louder = 2 * load(source)[name]
    save_file({name: louder}, tmp_path / "louder.safetensors")
    variant = Variant(retained(UNIFORM), read_header(tmp_path / "louder.safetensors"), options)
    verdict = judge(Decoder(open_checkpoint(source)), samples, {"a": variant})["a"]
    edit(source, tmp_path / "edited", lambda found: found | {name: louder})
    run(tmp_path / "edited", tmp_path / "written", UNIFORM, options)
    expected = MaskedModel(tmp_path / "written").run(samples)
    assert deviation(verdict, expected, unpruned) < JUDGED
    assert deviation(verdict, whole.run(samples, UNIFORM), unpruned) > 1000 * JUDGED


def test_a_layer_is_as_it_was_afterwards(decoder):
    layer = decoder.layer(1)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    options = Options(1.2, 0.3, 3)
    down_proj = torch.zeros_like(layer.experts.down_proj)
    with (
        pytest.raises(KeyboardInterrupt),
        Variant(retained(UNIFORM), options=options).applied(layer, 1, down_proj),
    ):
        assert layer.config.top_k_experts == 3
        assert not torch.equal(layer.router.proj.weight, before["router.proj.weight"])
        raise KeyboardInterrupt
    assert layer.config.top_k_experts == 4
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    logits = layer.router.proj(torch.ones(1, 256))
    assert bool(logits.isfinite().all())


def test_interval_counts_samples():
    verdict = Verdict(np.arange(12.0), np.array([1.0, 2.0, 6.0]), 0.5, np.zeros(3))
    assert verdict.mean == 5.5
    assert verdict.half_width == pytest.approx(1.96 * np.sqrt((4 + 1 + 9) / 2) / np.sqrt(3))
    assert Verdict(np.arange(4.0), np.array([1.5]), 0.5, np.zeros(3)).half_width == float("inf")
    found = verdict.to_json()
    assert (found["mean_kld"], found["median_kld"], found["same_top"]) == (5.5, 5.5, 0.5)
    assert found["p99_kld"] == pytest.approx(10.89)


def test_answers_that_are_not_finite(samples, tmp_path):
    name = "model.language_model.layers.2.mlp.up_proj.weight"
    edit(EXAMPLE, tmp_path / "broken", lambda found: found | {name: found[name] * float("nan")})
    broken = Decoder(open_checkpoint(tmp_path / "broken"), torch.float32)
    with pytest.raises(InputError, match="not finite: try --dtype float32"):
        judge(broken, samples[:1], {"a": Variant(RetainedExperts.all_of(16, 3)), "b": Variant(retained(UNIFORM))})
