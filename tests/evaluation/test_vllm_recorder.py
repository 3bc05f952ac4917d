"""Distributions are recorded where vLLM computes them: its first model runner, which must be the one that runs."""

from types import SimpleNamespace

import pytest

from vllm_gemma4q.evaluation.engines.vllm import _RECORDABLE
from vllm_gemma4q.evaluation.engines.vllm_recorder import Recorder

pytestmark = pytest.mark.slow


def recorder(sampler):
    found = Recorder()
    found.rank, found.model_runner = 0, SimpleNamespace(sampler=sampler)
    return found


def test_the_first_runner_is_asked_for(monkeypatch):
    """As on a GPU, where Triton is: left alone vLLM takes its second runner."""
    config = pytest.importorskip("vllm.config.vllm")
    if not hasattr(config.VllmConfig, "use_v2_model_runner"):
        pytest.skip("this vLLM has one model runner")
    monkeypatch.setattr(config, "HAS_TRITON", True)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    assert config.VllmConfig().use_v2_model_runner
    for name, value in _RECORDABLE.items():
        monkeypatch.setenv(name, value)
    assert not config.VllmConfig().use_v2_model_runner


def test_first_runners_sampler_is_recorded(tmp_path):
    sampler = pytest.importorskip("vllm.v1.sample.sampler").Sampler()
    recorder(sampler).gemma4q_record(str(tmp_path / "rows"), [(0, 1)])
    assert "compute_logprobs" in vars(sampler)
    assert (tmp_path / "rows").read_bytes() == b""


def test_second_runners_sampler_is_refused(tmp_path):
    kind = pytest.importorskip("vllm.v1.worker.gpu.sample.sampler").Sampler
    with pytest.raises(RuntimeError, match=r"distributions: got vllm\.v1\.worker\.gpu\..*Sampler, expected"):
        recorder(object.__new__(kind)).gemma4q_record(str(tmp_path / "rows"), [(0, 1)])
    assert not (tmp_path / "rows").exists()
