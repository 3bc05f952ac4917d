"""Streamed calibration of a checkpoint whose layers have different numbers of experts."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pruned_moe.pruned_checkpoints import NON_UNIFORM, masked_logprobs, prune, swap_experts
from tolerances import MASKED_LOGPROBS
from vllm_plugin.checkpoints import edit

from vllm_gemma4q.calibration.calibrate import Calibration, calibrate
from vllm_gemma4q.calibration.decoder import Decoder
from vllm_gemma4q.calibration.statistics import read_statistics
from vllm_gemma4q.calibration.texts import load_samples
from vllm_gemma4q.checkpoint import open_checkpoint

SMALL = Path(__file__).resolve().parents[2] / "examples" / "small_gemma4" / "moe"
PROMPT = [2, *range(40, 130)]
SOFTCAP = 30.0


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread, and lose much where a core is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prune(SMALL, tmp_path_factory.mktemp("pruned") / "non_uniform", NON_UNIFORM)


def _streamed_logprobs(folder: Path) -> np.ndarray:
    """What the decoder's layers, run one by one, say of the prompt: float32 [T - 1, V]."""
    decoder = Decoder(open_checkpoint(folder), torch.float32)
    with torch.no_grad():
        hidden = decoder.embed(PROMPT)
        for index in range(decoder.n_layers):
            hidden = decoder.run(decoder.layer(index), hidden)
        logits = decoder.norm()(hidden) @ decoder.head(0, decoder.architecture.vocab_size).T
    capped = SOFTCAP * (logits / SOFTCAP).tanh()
    return capped[:-1].log_softmax(dim=-1).numpy()


def test_streamed_layers_are_those_of_the_masked_model(pruned: Path, tmp_path: Path) -> None:
    [expected] = masked_logprobs(SMALL, NON_UNIFORM, [PROMPT])
    deviation = np.abs(_streamed_logprobs(pruned) - expected).max()
    swapped = edit(pruned, tmp_path / "swapped", lambda tensors: swap_experts(tensors, 1, 2, 5))
    corrupted = np.abs(_streamed_logprobs(swapped) - expected).max()
    print(deviation, corrupted)
    assert deviation <= MASKED_LOGPROBS < corrupted


def test_statistics_have_as_many_experts_as_the_layer(pruned: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A small model reads a few sentences about cats, kites and the weather. " * 30)
    samples = load_samples(pruned, [text], 2, 64)
    run = Calibration(Decoder(open_checkpoint(pruned), torch.float32), samples, 64, 1 << 30, False)
    assert calibrate(run, tmp_path / "statistics", tmp_path / "work")
    statistics = read_statistics(tmp_path / "statistics")
    for layer, kept in enumerate(NON_UNIFORM):
        experts = statistics.inputs(f"model.language_model.layers.{layer}.experts.gate_up_proj")
        assert len(experts.count) == len(kept)
        assert experts.count.sum() == 4 * sum(len(ids) for ids in samples.ids)
