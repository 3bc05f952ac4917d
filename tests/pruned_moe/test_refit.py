"""The refit in closed form: ridge regression, of what is routed alone, and a prune that moves the model less."""

import random

import numpy as np
import pytest
import torch
from masked_model import MaskedModel
from prune_files import EXAMPLE, LAYERS, N_LAYERS, NUM_EXPERTS, differences, one_by_one, retained, same, write
from pruned_checkpoints import NON_UNIFORM, UNIFORM
from tolerances import REFIT_KLD, RIDGE_REGRESSION, rms_error
from vllm_plugin.checkpoints import edit, load

from vllm_gemma4q.calibration.decoder import Decoder
from vllm_gemma4q.calibration.texts import load_samples
from vllm_gemma4q.calibration.work import Work
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.run import JOURNAL
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.pruned_moe import refit as module
from vllm_gemma4q.pruned_moe.judge import judge
from vllm_gemma4q.pruned_moe.knobs import Options
from vllm_gemma4q.pruned_moe.prune import plan
from vllm_gemma4q.pruned_moe.refit import PASSES, Refit, refitted
from vllm_gemma4q.pruned_moe.streams import Variant

ALL = tuple(range(NUM_EXPERTS))
SAMPLES, LENGTH = 32, 192

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def decoder():
    return Decoder(open_checkpoint(EXAMPLE), torch.float32)


def refit(decoder, variant, samples, folder, progress=lambda tokens: None):
    with Work(folder, {"what": "refit"}) as work:
        job = Refit(decoder, variant, samples, work)
        job.run(progress)
        return refitted(work, decoder), job.n_steps


@pytest.fixture(scope="module")
def trained(text):
    return load_samples(EXAMPLE, [text], SAMPLES, LENGTH).ids


@pytest.fixture(scope="module")
def unseen(held_out):
    return load_samples(EXAMPLE, [held_out], 12, LENGTH).ids


@pytest.fixture(scope="module")
def found(decoder, trained, tmp_path_factory, one_thread):
    """Of the prune to 12 of 16: refitted weights."""
    reports = []
    folder = tmp_path_factory.mktemp("refit") / "work"
    weights, n_steps = refit(decoder, Variant(retained(UNIFORM)), trained, folder, reports.append)
    assert sum(reports) == n_steps == PASSES * N_LAYERS * sum(map(len, trained))
    assert sorted(path.name for path in folder.iterdir()) == [
        JOURNAL,
        *(f"layer-{layer:05d}.safetensors" for layer in range(N_LAYERS)),
    ]
    return weights


def augmented(inputs, outputs, share, few=8.0):
    """Least squares with the ridge as further rows, by singular values in float64."""
    share += few * inputs.shape[1] / inputs.shape[0]
    inputs, outputs = inputs.double().numpy(), outputs.double().numpy()
    width = inputs.shape[1]
    ridge = share * np.square(inputs).sum() / width
    rows = np.concatenate([inputs, np.sqrt(ridge) * np.eye(width)])
    return torch.tensor(np.linalg.lstsq(rows, np.concatenate([outputs, np.zeros((width, outputs.shape[1]))]))[0])


@pytest.mark.parametrize("n_tokens", [3, 40, 500])
def test_ridge_regression(n_tokens):
    inputs, outputs = torch.randn(n_tokens, 16) * torch.linspace(0.1, 2, 16), torch.randn(n_tokens, 24)
    got = module._solve(inputs, outputs)
    assert rms_error(got, augmented(inputs, outputs, 0.1)) < RIDGE_REGRESSION
    assert rms_error(got, augmented(inputs, outputs, 0.11)) > RIDGE_REGRESSION
    assert rms_error(got, augmented(inputs, outputs, 0.1, 8.8)) > RIDGE_REGRESSION
    assert rms_error(got, augmented(inputs * 1.1, outputs, 0.1)) > RIDGE_REGRESSION


def test_nothing_in_nothing_learned():
    assert torch.equal(module._solve(torch.zeros(5, 4), torch.randn(5, 3)), torch.zeros(4, 3))


def test_held_out_divergence_falls(decoder, found, unseen):
    plain = Variant(retained(UNIFORM))
    verdicts = judge(decoder, unseen, {"plain": plain, "refit": Variant(plain.retained, found.tensors)})
    before, after = verdicts["plain"], verdicts["refit"]
    assert after.mean < 0.85 * before.mean
    assert after.same_top > before.same_top
    assert (after.layer_error < before.layer_error).all()


def test_little_text_does_no_harm(decoder, trained, unseen, tmp_path):
    """A hundred tokens an expert, of 64 channels."""
    plain = Variant(retained(UNIFORM))
    weights, _ = refit(decoder, plain, trained[:2], tmp_path / "work")
    verdicts = judge(decoder, unseen, {"plain": plain, "refit": Variant(plain.retained, weights.tensors)})
    assert verdicts["refit"].mean < verdicts["plain"].mean


def test_judged_as_the_checkpoint_that_is_written(decoder, found, unseen, tmp_path):
    write(plan(open_checkpoint(EXAMPLE), retained(UNIFORM), refitted=found), tmp_path / "written")
    unpruned = MaskedModel(EXAMPLE).run(unseen)
    expected = MaskedModel(tmp_path / "written").run(unseen)
    verdict = judge(decoder, unseen, {"a": Variant(retained(UNIFORM), found.tensors)})["a"]
    kld = expected.divergence_from(unpruned)
    assert rms_error(torch.tensor(verdict.kld), kld) < REFIT_KLD
    assert verdict.same_top == expected.same_top(unpruned)
    plain = judge(decoder, unseen, {"a": Variant(retained(UNIFORM))})["a"]
    assert rms_error(torch.tensor(plain.kld), kld) > 1000 * REFIT_KLD


def down_proj(layer):
    return f"{LAYERS}{layer}.experts.down_proj"


def test_dropped_experts_stay_as_they_are(found):
    source = load(EXAMPLE)
    for layer, kept in enumerate(UNIFORM):
        after = load(found.folder)[down_proj(layer)]
        moved = [expert for expert in ALL if not same(after[expert], source[down_proj(layer)][expert])]
        assert moved == list(kept)


def test_experts_without_tokens_and_layers_without_drops(decoder, trained, tmp_path):
    """Three tokens reach 12 experts at most; which, the router of a layer that nothing before has moved tells. An
    expert that only tokens reach which have lost nothing stays as it is, too.
    """
    sample = list(trained[0][:3])
    kept = retained(NON_UNIFORM)
    chosen = []
    layer = decoder.layer(0)
    with torch.no_grad(), Variant(kept).applied(layer, 0):
        layer.experts.register_forward_pre_hook(lambda module, args: chosen.append(args[1]))
        decoder.run(layer, decoder.embed(sample))
    weights, n_steps = refit(decoder, Variant(kept), [sample], tmp_path / "work")
    assert n_steps == 3 * (PASSES + PASSES + PASSES - 1)
    assert set(weights.tensors) == {down_proj(0), down_proj(1)}
    source, after = load(EXAMPLE), load(tmp_path / "work")
    moved = [expert for expert in ALL if not same(after[down_proj(0)][expert], source[down_proj(0)][expert])]
    reached = set(chosen[0].flatten().tolist())
    assert 0 < len(moved) <= len(reached) < len(NON_UNIFORM[0])
    assert set(moved) <= reached
    conversion = plan(open_checkpoint(EXAMPLE), kept, refitted=weights)
    plain = write(plan(open_checkpoint(EXAMPLE), kept), tmp_path / "plain")
    assert differences(write(conversion, tmp_path / "refit"), plain) == [down_proj(0), down_proj(1)]


def test_nothing_to_drop_is_nothing_to_learn(decoder, trained, tmp_path):
    kept = retained([ALL] * N_LAYERS)
    weights, n_steps = refit(decoder, Variant(kept), trained[:1], tmp_path / "work")
    assert (len(weights.tensors), n_steps) == (0, (PASSES - 1) * N_LAYERS * len(trained[0]))
    result = write(plan(open_checkpoint(EXAMPLE), kept, refitted=weights), tmp_path / "target")
    assert not differences(result, load(EXAMPLE))


def test_fits_the_prune_with_its_knobs(decoder, found, trained, unseen, tmp_path):
    plain = Variant(retained(UNIFORM), options=Options(top_k=2, shared_boost=1.5))
    weights, _ = refit(decoder, plain, trained, tmp_path / "work")
    fitted = {"refit": weights.tensors, "plain": {}}
    variants = {name: Variant(plain.retained, tensors, plain.options) for name, tensors in fitted.items()}
    verdicts = judge(decoder, unseen, variants)
    assert verdicts["refit"].mean < 0.85 * verdicts["plain"].mean
    assert differences(load(weights.folder), load(found.folder)) == [down_proj(layer) for layer in range(N_LAYERS)]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_interrupted_at_random_and_resumed_is_byte_identical(decoder, trained, tmp_path):
    samples, generator = trained[:4], random.Random(0)
    refit(decoder, Variant(retained(NON_UNIFORM)), samples, tmp_path / "whole")
    expected, n_interrupted = content(tmp_path / "whole"), 0

    while True:
        left = iter(range(generator.randrange(6, 28)))

        def progress(tokens, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt

        try:
            refit(decoder, Variant(retained(NON_UNIFORM)), samples, tmp_path / "work", progress)
            break
        except KeyboardInterrupt:
            n_interrupted += 1
            assert n_interrupted < 50
    assert n_interrupted >= 3
    assert content(tmp_path / "work") == expected
    resumed = []
    weights, n_steps = refit(decoder, Variant(retained(NON_UNIFORM)), samples, tmp_path / "work", resumed.append)
    assert resumed == [n_steps]
    written = write(plan(open_checkpoint(EXAMPLE), retained(NON_UNIFORM), refitted=weights), tmp_path / "target")
    assert same(written[down_proj(0)], load(tmp_path / "whole")[down_proj(0)][list(NON_UNIFORM[0])])


def test_activations_left_by_a_kill_are_removed(decoder, trained, tmp_path):
    """Killed when a layer was recorded, before what entered it was removed."""
    samples = trained[:2]

    def stop(self, boundary):
        if boundary == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Refit, "_drop_before", stop)
        refit(decoder, Variant(retained(NON_UNIFORM)), samples, tmp_path / "work")
    assert (tmp_path / "work" / "unpruned-00001.bin").exists()
    refit(decoder, Variant(retained(NON_UNIFORM)), samples, tmp_path / "work")
    refit(decoder, Variant(retained(NON_UNIFORM)), samples, tmp_path / "whole")
    assert content(tmp_path / "work") == content(tmp_path / "whole")


def test_activations_that_are_not_finite(trained, tmp_path):
    name = f"{LAYERS}1.experts.gate_up_proj"
    edit(EXAMPLE, tmp_path / "broken", lambda tensors: tensors | {name: tensors[name] * float("inf")})
    broken = Decoder(open_checkpoint(tmp_path / "broken"), torch.float32)
    message = f"tensor {LAYERS}1.experts.down_proj: refit: .* not finite: try --dtype float32"
    with pytest.raises(InputError, match=message):
        refit(broken, Variant(retained(UNIFORM)), trained[:1], tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_weights_stay_in_the_source_dtype(trained, tmp_path):
    """Whatever is computed in, and although attention is stored in another."""
    edit(EXAMPLE, tmp_path / "mixed", lambda tensors: {
        name: tensor.float() if ".experts." in name else tensor for name, tensor in tensors.items()
    })  # fmt: skip
    decoder = Decoder(open_checkpoint(tmp_path / "mixed"), torch.float32)
    weights, _ = refit(decoder, Variant(retained(UNIFORM)), trained[:1], tmp_path / "work")
    assert {tensor.dtype for tensor in weights.tensors.values()} == {"F32"}
    result = write(plan(open_checkpoint(tmp_path / "mixed"), retained(UNIFORM), refitted=weights), tmp_path / "target")
    assert same(result[down_proj(1)], load(tmp_path / "work")[down_proj(1)][list(UNIFORM[1])])


def test_layers_of_differing_dtypes(trained, tmp_path):
    edit(EXAMPLE, tmp_path / "mixed", lambda tensors: tensors | {down_proj(1): tensors[down_proj(1)].float()})
    source = open_checkpoint(tmp_path / "mixed")
    weights, _ = refit(Decoder(source, torch.float32), Variant(retained(UNIFORM)), trained[:1], tmp_path / "work")
    result = write(plan(source, retained(UNIFORM), refitted=weights), tmp_path / "target")
    for layer, kept in enumerate(UNIFORM):
        dtype = torch.float32 if layer == 1 else torch.bfloat16
        assert result[down_proj(layer)].dtype == dtype
        assert same(result[down_proj(layer)], load(tmp_path / "work")[down_proj(layer)][list(kept)])


def test_experts_of_differing_dtypes_in_a_layer(trained, tmp_path):
    """Nothing has been computed when it is told."""
    name = f"{LAYERS}1.experts.3.down_proj.weight"

    def change(tensors):
        split = one_by_one(tensors)
        return split | {name: split[name].float()}

    edit(EXAMPLE, tmp_path / "mixed", change)
    decoder = Decoder(open_checkpoint(tmp_path / "mixed"), torch.float32)
    with pytest.raises(InputError, match=rf"tensor {LAYERS}1\..*: refit: got BF16, expected F32 as {name} has"):
        refit(decoder, Variant(retained(UNIFORM)), trained[:1], tmp_path / "work")
