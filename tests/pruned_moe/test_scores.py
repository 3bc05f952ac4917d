"""Every recipe against its formula, spelled out expert by expert, on a statistics file made for the purpose."""

import json
import math

import numpy as np
import pytest
import torch
from calibration.whole_model import watch
from prune_files import EXAMPLE, LAYERS, one_by_one
from tolerances import CALIBRATION, RECIPES_BY_HAND, WEIGHT_SCORES, rms_error
from vllm_plugin.checkpoints import edit, load

from vllm_gemma4q.calibration.calibrate import Calibration, calibrate
from vllm_gemma4q.calibration.decoder import Decoder
from vllm_gemma4q.calibration.statistics import Routing, as_arrays, read_statistics, write_statistics
from vllm_gemma4q.calibration.texts import load_samples
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.pruned_moe.choose import Chooser, overlaps
from vllm_gemma4q.pruned_moe.scores import RECIPES, Evidence, evidence
from vllm_gemma4q.pruned_moe.select import best, turns
from vllm_gemma4q.pruned_moe.weight_scores import WEIGHT_RECIPES, expert_bytes, weight_sums

N_LAYERS, NUM_EXPERTS, KEEP = 11, 16, 12  # layers 2 and 10: their order is not that of their names
CLASSES = [0, 2, 1, 0, 2, 2]  # of each sample
TEXTS = ["chat.txt", "code.txt", "math.txt"]
UNREACHED = 5  # by any token of any layer


def made_routing(seed):
    rng = np.random.default_rng(seed)
    found = {
        name: rng.gamma(1, size=NUM_EXPERTS)
        for name in ("probability_sum", "gate_sum", "norm_sum", "norm_square_sum", "gated_norm_sum", "contribution_sum")
    }
    counts = rng.integers(1, 90, (len(CLASSES), NUM_EXPERTS))
    norms = rng.gamma(1, 30, counts.shape) * rng.gamma(0.3, 1, NUM_EXPERTS)
    for values in (*found.values(), counts.T, norms.T):
        values[UNREACHED] = 0
    maximum = rng.random(NUM_EXPERTS)
    found = {name: values * counts.sum(0) for name, values in found.items()}
    made = Routing(
        count=counts.sum(0), norm_max=maximum, sample_count=counts, sample_gated_norm=norms.astype(np.float32), **found
    )
    return made


@pytest.fixture(scope="module")
def layers():
    return [made_routing(seed) for seed in range(N_LAYERS)]


def write(path, layers, **details):
    arrays = {"samples.text": np.array(CLASSES, np.int32), "samples.tokens": np.full(len(CLASSES), 90, np.int32)}
    for number, layer in enumerate(layers):
        arrays |= as_arrays(f"{LAYERS}{number}.experts", layer)
    texts = [{"name": name, "sha256": ""} for name in TEXTS]
    write_statistics(path, arrays, {}, {"texts": texts, "model": {"name": "other", "sha256": "0"}, **details})
    return read_statistics(path)


@pytest.fixture(scope="module")
def statistics(layers, tmp_path_factory):
    return write(tmp_path_factory.mktemp("made") / "statistics", layers)


@pytest.fixture
def found(statistics):
    return evidence(statistics, KEEP, {"code.txt": 3.0})[0]


def base(layer, expert, number):
    """Of one class: alpha x wnorm + tc, summed over its samples."""
    mine = [sample for sample, own in enumerate(CLASSES) if own == number]
    return sum(2.0 * float(layer.sample_gated_norm[one, expert]) + int(layer.sample_count[one, expert]) for one in mine)


def normalized(layer, expert, number):
    mean = sum(base(layer, other, number) for other in range(NUM_EXPERTS)) / NUM_EXPERTS
    return base(layer, expert, number) / mean


def per_token(name):
    return lambda layer, expert: getattr(layer, name)[expert] / layer.count[expert] if layer.count[expert] else 0.0


def total(name):
    return lambda layer, expert: getattr(layer, name)[expert]


BY_HAND = {
    "v3": lambda layer, expert: sum(base(layer, expert, number) for number in range(3)),
    "v4": lambda layer, expert: max(normalized(layer, expert, number) for number in range(3)),
    "reap": per_token("gated_norm_sum"),
    "man": per_token("norm_sum"),
    "msan": per_token("norm_square_sum"),
    "contribution": total("gated_norm_sum"),
    "easy-ep": total("contribution_sum"),
    "frequency": total("count"),
    "probability": total("probability_sum"),
}


def test_no_recipe_is_left_out():
    assert {*BY_HAND, "v5-coder"} == set(RECIPES)


@pytest.mark.parametrize("recipe", BY_HAND)
def test_recipe(recipe, found, layers):
    scores = RECIPES[recipe](found)
    expected = np.array([[BY_HAND[recipe](layer, expert) for expert in range(NUM_EXPERTS)] for layer in layers])
    assert (scores.dtype, scores.shape) == (np.float64, (N_LAYERS, NUM_EXPERTS))
    assert rms_error(torch.tensor(scores), torch.tensor(expected)) < RECIPES_BY_HAND
    expected[3, 4] *= 1.1
    assert rms_error(torch.tensor(scores), torch.tensor(expected)) > RECIPES_BY_HAND
    assert (scores[:, UNREACHED] == 0).all()


def kept_by_v5_coder(layers, keep, weights):
    """By layer, the experts that stay, in the order in which they are taken."""

    def v4(layer, expert):
        return max(normalized(layer, expert, number) for number in range(3))

    def rank(layer, expert, number):
        mine = normalized(layer, expert, number)
        return sum(normalized(layer, other, number) < mine for other in range(NUM_EXPERTS)) / (NUM_EXPERTS - 1)

    safe = [sorted(range(NUM_EXPERTS), key=lambda expert, of=layer: -v4(of, expert)) for layer in layers]
    means = [
        sum(v4(layer, expert) for expert in order[:keep]) / keep for layer, order in zip(layers, safe, strict=True)
    ]
    result = []
    for layer, order, mean in zip(layers, safe, means, strict=True):
        share = (mean - min(means)) / (max(means) - min(means))
        floor = math.floor((75 + 20 * share) * keep / 98)
        score = {
            expert: max(weights[number] * rank(layer, expert, number) for number in range(3))
            + 0.5 * sum(rank(layer, expert, number) for number in range(3)) / 3
            for expert in range(NUM_EXPERTS)
        }
        best_first = sorted(range(NUM_EXPERTS), key=lambda expert, of=score: -of[expert])
        rest = [expert for expert in best_first if expert not in order[:floor]]
        result.append((set(order[:floor]), rest[: keep - floor]))
    return result


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 3.0, 1.0)], ids=["even", "code"])
def test_v5_coder_keeps_the_floor_and_then_by_weighted_ranks(weights, statistics, layers):
    given = dict(zip(TEXTS, weights, strict=True))
    scores = RECIPES["v5-coder"](evidence(statistics, KEEP, given)[0])
    kept = best(scores, [KEEP] * N_LAYERS).kept
    expected = kept_by_v5_coder(layers, KEEP, weights)
    assert [set(one) for one in kept] == [floor | set(rest) for floor, rest in expected]
    sizes = [len(floor) for floor, _ in expected]
    assert (min(sizes), max(sizes)) == (9, 11)
    for layer, (floor, rest) in enumerate(expected):  # the floor is first, and no score grows from layer to layer
        order = (-scores[layer]).argsort(kind="stable")
        assert set(order[: len(floor)]) == floor
        assert order[len(floor) : KEEP].tolist() == rest
    assert scores.max() < 4 * (max(weights) + 0.5)


def test_v5_coder_without_a_floor_keeps_others(statistics, layers):
    """The floor and the weights are both needed for the result above."""
    even, weighted = (RECIPES["v5-coder"](evidence(statistics, KEEP, given)[0]) for given in ({}, {"code.txt": 3.0}))
    assert best(even, [KEEP] * N_LAYERS) != best(weighted, [KEEP] * N_LAYERS)
    safe = RECIPES["v4"](evidence(statistics, KEEP)[0])
    assert best(even, [KEEP] * N_LAYERS) != best(safe, [KEEP] * N_LAYERS)


def test_floors_of_98():
    """The published numbers: 75 in the least concentrated layer, 95 in the most."""
    rng = np.random.default_rng(0)

    def layer(power):
        norms = rng.random((1, 128)) ** power
        zero = np.zeros(128)
        return Routing(zero, zero, zero, zero, zero, zero, zero, zero, np.zeros((1, 128), int), norms)

    scores = RECIPES["v5-coder"](Evidence([layer(power) for power in (0.1, 1, 9)], np.zeros(1, int), keep=98))
    protected = (scores > 1.5).sum(1)
    assert (protected[0], protected[2]) == (75, 95)
    assert 75 < protected[1] < 95


def test_classes_take_turns():
    by_class = np.array([[[9, 8, 7, 0, 1.0]], [[9, 1, 8, 2, 3.0]]])
    assert turns(by_class).tolist() == [[0, 2, 1, 4, 3]]


def test_quota_is_the_best_of_each_class(statistics, layers, found):
    order = turns(found.by_class).argsort(1)
    for layer, taken in zip(layers, order, strict=True):
        free = set(range(NUM_EXPERTS))
        for turn, expert in enumerate(taken):
            wanted = max(free, key=lambda other, of=layer, turn=turn: base(of, other, turn % 3))
            assert expert == wanted
            free.remove(expert)


def test_statistics_that_do_not_fit(layers, tmp_path, statistics):
    with pytest.raises(InputError, match=r"class poems.txt: not calibrated on, expected one of chat.txt, code.txt"):
        evidence(statistics, KEEP, {"poems.txt": 1.0})
    with pytest.raises(InputError, match="dense: statistics of a dense model"):
        evidence(write(tmp_path / "dense", []), KEEP)
    smaller = Routing(**{name: values[..., :12] for name, values in vars(layers[1]).items()})
    with pytest.raises(InputError, match="pruned: statistics of a model that was pruned: layers with 12 to 16 experts"):
        evidence(write(tmp_path / "pruned", [layers[0], smaller]), KEEP)


@pytest.fixture(scope="module")
def calibrated(text, held_out, one_thread, tmp_path_factory):
    """(statistics, samples) of the small mixture in float32, of two texts."""
    folder = tmp_path_factory.mktemp("calibrated")
    samples = load_samples(EXAMPLE, [text, held_out], 4, 80)
    run = Calibration(Decoder(open_checkpoint(EXAMPLE), torch.float32), samples, 80, 1 << 30, False)
    assert calibrate(run, folder / "statistics", folder / "work")
    return read_statistics(folder / "statistics"), samples


def test_real_calibration(calibrated):
    """v4 and REAP from the statistics file, and from hooks on the whole model in transformers."""
    statistics, samples = calibrated
    routed = watch(EXAMPLE, samples.ids).routed
    expected = {"v4": [], "reap": []}
    for layer in range(3):
        by_class, gated, count = np.zeros((2, 16)), np.zeros(16), np.zeros(16)
        for own, (_, index, gates, norms, _) in zip(samples.texts, routed[f"{LAYERS}{layer}.experts"], strict=True):
            for expert in range(16):
                chosen = index == expert
                values = (gates * norms)[chosen].numpy()
                by_class[own, expert] += 2 * np.linalg.norm(values) + chosen.sum().item()
                gated[expert] += values.sum()
                count[expert] += len(values)
        expected["v4"].append((by_class / by_class.mean(1, keepdims=True)).max(0))
        expected["reap"].append(gated / count)
    chooser = Chooser(open_checkpoint(EXAMPLE), statistics, KEEP)
    for recipe, values in expected.items():
        assert rms_error(torch.tensor(chooser.scores(recipe)), torch.tensor(np.array(values))) < CALIBRATION, recipe
    assert rms_error(torch.tensor(chooser.scores("v4")), torch.tensor(chooser.scores("reap"))) > CALIBRATION


def weights_by_hand(tensors, layer, expert):
    parts = [tensors[f"{LAYERS}{layer}.experts.{name}"][expert].double() for name in ("gate_up_proj", "down_proj")]
    return torch.cat([part.flatten() for part in parts])


def test_scores_from_weights(tmp_path):
    source, tensors, seen = open_checkpoint(EXAMPLE), load(EXAMPLE), []
    sums = weight_sums(source, seen.append)
    assert sum(seen) == expert_bytes(source) == 3 * 16 * (128 + 64) * 256 * 2
    alone = weight_sums(open_checkpoint(edit(EXAMPLE, tmp_path / "alone", one_by_one)))
    weights = [[weights_by_hand(tensors, layer, expert) for expert in range(16)] for layer in range(3)]
    by_hand = {
        "magnitude": torch.tensor([[one.norm() for one in row] for row in weights]),
        "aimer": torch.tensor([[one.abs().mean() / one.square().mean().sqrt() for one in row] for row in weights]),
    }
    for name, recipe in WEIGHT_RECIPES.items():
        for found in (sums, alone):
            assert rms_error(torch.tensor(recipe(found)), by_hand[name]) < WEIGHT_SCORES
        by_hand[name][1, 2] *= 1.1
        assert rms_error(torch.tensor(recipe(sums)), by_hand[name]) > WEIGHT_SCORES


def test_random_scores_follow_the_seed():
    source = open_checkpoint(EXAMPLE)
    first, again, other = (Chooser(source, None, KEEP, seed=seed).uniform("random") for seed in (0, 0, 1))
    assert first == again != other
    assert first.counts == (KEEP,) * 3


def test_what_is_at_hand(calibrated):
    source, (statistics, _) = open_checkpoint(EXAMPLE), calibrated
    chooser = Chooser(source, None, KEEP)
    assert chooser.available == ["aimer", "magnitude", "random"]
    assert chooser.at_hand == ["random"]
    chooser.scores("aimer")
    assert chooser.at_hand == chooser.available
    with pytest.raises(InputError, match="--statistics is missing"):
        chooser.scores("v3")
    assert Chooser(source, statistics, KEEP).available == [*RECIPES, "quota", "aimer", "magnitude", "random"]


def test_models_that_do_not_fit(statistics, tmp_path):
    source = open_checkpoint(EXAMPLE)
    with pytest.raises(InputError, match="statistics of another model: other"):
        Chooser(source, statistics, KEEP)
    for keep in (3, 17):
        with pytest.raises(InputError, match=rf"--keep: got {keep}, expected 4 \(top_k\)..16"):
            Chooser(source, None, keep)
    assert Chooser(source, None, 3, top_k=2).uniform("random").counts == (3, 3, 3)
    edit(EXAMPLE, tmp_path / "int8", lambda tensors: tensors)
    config = json.loads((tmp_path / "int8" / "config.json").read_text()) | {"quantization_config": {}}
    (tmp_path / "int8" / "config.json").write_text(json.dumps(config))
    quantized = Chooser(open_checkpoint(tmp_path / "int8"), statistics, KEEP)
    assert quantized.available == [*RECIPES, "quota", "random"]
    with pytest.raises(InputError, match=r"statistics: of \(11, 16\) layers and experts, the model has \(3, 16\)"):
        quantized.scores("v3")


def test_overlap_is_the_share_of_what_is_dropped():
    one, other = best(np.array([[4, 3, 2, 1.0]]), [2]), best(np.array([[1, 3, 2, 4.0]]), [2])
    assert (one.dropped, other.dropped) == (((2, 3),), ((0, 2),))
    assert overlaps(one, {"other": other, "itself": one}) == {"other": 0.5, "itself": 1.0}
    assert overlaps(best(np.ones((1, 4)), [4]), {"other": other}) == {"other": 0.0}
