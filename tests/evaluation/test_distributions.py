"""Perplexity and divergence against their definitions in float64."""

import math

import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation import distributions
from vllm_gemma4q.evaluation.distributions import compare
from vllm_gemma4q.evaluation.perplexity import perplexity

ROWS, VOCABULARY = 301, 97


@pytest.fixture
def tables(tmp_path):
    """Two files, and what they hold in float64."""
    random = np.random.default_rng(1)
    logits = random.normal(size=(ROWS, VOCABULARY)) * 4
    both = [log_softmax(logits, axis=1), log_softmax(logits + random.normal(size=logits.shape), axis=1)]
    paths = [tmp_path / "reference", tmp_path / "other"]
    for path, table in zip(paths, both, strict=True):
        table.astype(np.float32).tofile(path)
    return paths, [table.astype(np.float32).astype(np.float64) for table in both]


@pytest.mark.parametrize("at_once", [1, 7 * VOCABULARY, 1 << 22])
def test_divergence_is_its_definition(tables, at_once, monkeypatch):
    monkeypatch.setattr(distributions, "_VALUES_AT_ONCE", at_once)
    paths, (p, q) = tables
    found = compare(*paths, VOCABULARY)
    kld = rel_entr(np.exp(p), np.exp(q)).sum(axis=1)
    assert found.mean_kld == pytest.approx(kld.mean(), rel=1e-6)
    assert found.error == pytest.approx(kld.std(ddof=1) / math.sqrt(ROWS), rel=1e-6)
    assert found.p999_kld == pytest.approx(np.quantile(kld, 0.999), rel=1e-6)
    assert found.max_kld == pytest.approx(kld.max(), rel=1e-6)
    assert found.same_top == (p.argmax(axis=1) == q.argmax(axis=1)).mean() < 1
    assert found.positions == ROWS


def test_a_span_of_rows(tables):
    paths, (p, q) = tables
    found = compare(*paths, VOCABULARY, (100, 250))
    assert found.positions == 150
    assert found.mean_kld == pytest.approx(rel_entr(np.exp(p), np.exp(q))[100:250].sum(axis=1).mean(), rel=1e-6)


def test_of_itself_it_is_nothing(tables):
    (path, _), _ = tables
    found = compare(path, path, VOCABULARY)
    assert (found.mean_kld, found.max_kld, found.same_top) == (0, 0, 1)


def test_excluded_tokens(tmp_path):
    """A token that the reference excludes adds nothing; one that only the other excludes is infinitely far."""
    with np.errstate(divide="ignore"):
        np.log(np.array([[0.5, 0.5, 0.0]] * 3, np.float32)).tofile(tmp_path / "p")
        np.log(np.array([*[[0.5, 0.25, 0.25]] * 2, [1.0, 0.0, 0.0]], np.float32)).tofile(tmp_path / "q")
    found = compare(tmp_path / "p", tmp_path / "q", 3)
    assert found.max_kld == math.inf
    assert compare(tmp_path / "p", tmp_path / "q", 3, (0, 2)).max_kld == pytest.approx(0.5 * math.log(2))


def test_files_that_do_not_fit(tables, tmp_path):
    paths, _ = tables
    with pytest.raises(InputError, match="expected rows of 96 float32"):
        compare(*paths, 96)
    paths[1].write_bytes(paths[1].read_bytes()[: 4 * VOCABULARY * 300])
    with pytest.raises(InputError, match="other: got 300 positions, expected the 301 of reference"):
        compare(*paths, VOCABULARY)
    table = np.fromfile(paths[0], np.float32)
    table[5] = np.nan
    table.tofile(tmp_path / "bad")
    with pytest.raises(InputError, match="bad: a log-probability is not a number"):
        compare(paths[0], tmp_path / "bad", VOCABULARY)


def test_perplexity_is_its_definition():
    logprobs = np.log(np.array([0.5, 0.25, 0.125, 0.5], np.float32))
    found = perplexity(logprobs)
    nats = np.log([2, 4, 8, 2])
    assert found.value == pytest.approx(math.exp(nats.mean()), rel=1e-6)
    assert found.error == pytest.approx(found.value * math.sqrt(nats.var() / 3), rel=1e-6)
    assert found.positions == 4


@pytest.mark.parametrize(("values", "message"), [([-1.0], "at least 2"), ([-1.0, -np.inf, np.nan], "got 2 of 3")])
def test_no_perplexity(values, message):
    with pytest.raises(ValueError, match=message):
        perplexity(np.array(values, np.float32))


def test_padding_is_left_out(tables, tmp_path):
    """Eight tokens that one file has more, of one in 100,000 together: as if they were not there."""
    paths, (_p, q) = tables
    padding = np.full((ROWS, 8), np.log(1e-5 / 8))
    np.hstack([q + np.log1p(-1e-5), padding]).astype(np.float32).tofile(tmp_path / "wide")
    expected = compare(*paths, VOCABULARY)
    found = compare(paths[0], tmp_path / "wide", VOCABULARY, other_vocabulary=VOCABULARY + 8)
    assert found.mean_kld == pytest.approx(expected.mean_kld, rel=1e-5)
    assert found.same_top == expected.same_top
    back = compare(tmp_path / "wide", paths[0], VOCABULARY + 8, other_vocabulary=VOCABULARY)
    assert back.mean_kld == pytest.approx(compare(paths[1], paths[0], VOCABULARY).mean_kld, rel=1e-5)


def test_tokens_that_are_used_are_no_padding(tables):
    paths, _ = tables
    table = np.fromfile(paths[1], np.float32).reshape(ROWS, VOCABULARY)
    np.ascontiguousarray(table[:, :-7]).tofile(paths[1])
    with pytest.raises(InputError, match=r"reference: tokens 90 to 96, .* hold \d\.\d\d% .* at most 0.1%"):
        compare(*paths, VOCABULARY, other_vocabulary=VOCABULARY - 7)


def test_a_floor(tables):
    paths, (p, q) = tables
    found = compare(*paths, VOCABULARY, floor=-6)
    terms = np.where(p > -6, np.exp(p) * (p - q), 0)
    assert found.mean_kld == pytest.approx(np.maximum(terms.sum(axis=1), 0).mean(), rel=1e-6)
    assert found.mean_kld != compare(*paths, VOCABULARY).mean_kld
