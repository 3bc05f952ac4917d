"""Numbers of ranks that the doctor refuses against those that vLLM's own configuration does, engine not started.

What vLLM notices only once it builds the model is measured by benchmarks/parallel.py, which runs the doctor, too.
"""

import json
import subprocess
import sys

import pytest
from doctor.broken_checkpoints import SMALL
from vllm_plugin.engine import engine_environment

from vllm_gemma4q.architecture import parse_text_architecture
from vllm_gemma4q.doctor.checks.parallel import refusal

pytestmark = [pytest.mark.engine, pytest.mark.slow]

RANKS = (1, 2, 3, 4, 6, 8)
CONFIGURE = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
found = []
for folder in sys.argv[2:]:
    refused = {}
    for ranks in json.loads(sys.argv[1]):
        try:
            EngineArgs(model=folder, tensor_parallel_size=ranks, enforce_eager=True).create_engine_config()
        except ValueError as error:
            refused[ranks] = str(error)
    found.append(refused)
print("FOUND", json.dumps(found))
"""


def test_ranks_that_are_refused() -> None:
    folders = [SMALL / kind for kind in ("dense", "moe")]
    command = [sys.executable, "-c", CONFIGURE, json.dumps(RANKS), *map(str, folders)]
    done = subprocess.run(command, env=engine_environment(), capture_output=True, text=True, timeout=300, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert found, done.stderr
    for folder, refused in zip(folders, json.loads(found[0].removeprefix("FOUND ")), strict=True):
        architecture = parse_text_architecture(json.loads((folder / "config.json").read_text()))
        expected = {ranks for ranks in RANKS if refusal(architecture, ranks, expert_parallel=False)}
        assert {int(ranks) for ranks in refused} == expected, (folder, refused)
