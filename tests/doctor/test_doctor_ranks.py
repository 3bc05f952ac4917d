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
refused = {}
for ranks in json.loads(sys.argv[2]):
    try:
        EngineArgs(model=sys.argv[1], tensor_parallel_size=ranks, enforce_eager=True).create_engine_config()
    except ValueError as error:
        refused[ranks] = str(error)
print("FOUND", json.dumps(refused))
"""


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_ranks_that_are_refused(kind: str) -> None:
    command = [sys.executable, "-c", CONFIGURE, str(SMALL / kind), json.dumps(RANKS)]
    done = subprocess.run(command, env=engine_environment(), capture_output=True, text=True, timeout=300, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert found, done.stderr
    refused = json.loads(found[0].removeprefix("FOUND "))
    architecture = parse_text_architecture(json.loads((SMALL / kind / "config.json").read_text()))
    expected = {ranks for ranks in RANKS if refusal(architecture, ranks, expert_parallel=False)}
    assert {int(ranks) for ranks in refused} == expected, refused
