"""Small trained models, text that they were trained on, and calibrations of both that tests share."""

import sys
from pathlib import Path

import pytest
import torch
from calibration_runs import ROOT, calibration

from vllm_gemma4q.calibration.calibrate import calibrate
from vllm_gemma4q.calibration.statistics import read_statistics

sys.path.insert(0, str(ROOT / "examples"))
from small_gemma4 import corpus


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small gain nothing from a second thread, and lose much where a core is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(corpus.training_sections())[:60_000])
    return path


@pytest.fixture(scope="session", params=["dense", "moe"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def calibrated(kind, text, tmp_path_factory):
    """(calibration, statistics) of one small model in float32, with Hessians."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("calibrated")
    run = calibration(kind, text, hessians=True)
    assert calibrate(run, folder / "statistics.safetensors", folder / "work")
    torch.set_num_threads(threads)
    assert [path.name for path in folder.iterdir()] == ["statistics.safetensors"]
    return run, read_statistics(folder / "statistics.safetensors")
