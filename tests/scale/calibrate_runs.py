"""Calibrations of the small trained models, of samples that need no tokenizer.

python calibrate_runs.py KIND TARGET WORKERS     prints the ids of processes
"""

import sys
from pathlib import Path

import torch
from scale_runs import announced

from gguf_mixed.tasks import Executor
from vllm_gemma4q.calibration.calibrate import Calibration, calibrate
from vllm_gemma4q.calibration.decoder import Decoder
from vllm_gemma4q.calibration.texts import Samples
from vllm_gemma4q.checkpoint import open_checkpoint

SMALL = Path(__file__).resolve().parents[2] / "examples" / "small_gemma4"
KINDS = ("dense", "moe")
IN_MEMORY, SPILLED = 1 << 30, 1
LENGTHS = [30, 22, 41] * 6  # more samples than parts


def calibration(kind: str | Path, limit: int = IN_MEMORY, length: int = 1) -> Calibration:
    """In float32, with Hessians; `length` times LENGTHS tokens."""
    decoder = Decoder(open_checkpoint(SMALL / kind), torch.float32)
    random = torch.Generator().manual_seed(5)
    ids = [torch.randint(8, 300, (n * length,), generator=random).tolist() for n in LENGTHS]
    return Calibration(decoder, Samples(ids, [0] * len(ids), [{"name": "made up"}], "plain text"), 80, limit, True)


def run(kind, target: Path, workers: Executor | None, progress=lambda done: None, limit=IN_MEMORY, length=1) -> int:
    """The steps that there are."""
    wanted = calibration(kind, limit, length)
    assert calibrate(wanted, target, target.with_suffix(".work"), progress=progress, workers=workers)
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    return wanted.n_steps


def main(kind: str, target: str, count: str) -> None:
    with announced(count) as workers:
        run(kind, Path(target), workers)


if __name__ == "__main__":
    main(*sys.argv[1:])
