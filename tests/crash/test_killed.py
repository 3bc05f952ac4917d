"""Every command that writes, killed at random moments and run again: the files of an unbroken run, and nothing else.

Every second kill comes at a moment of the run's time, the others just before, or in the middle of, a change of a file.
GEMMA4Q_CRASH_KILLS (50) and GEMMA4Q_CRASH_SEED (0) make longer campaigns, and others.
"""

import dataclasses

import pytest
from crash_runs import KILLS, SEED, Campaign


@pytest.mark.slow
def test_killed_and_run_again(server, case, tmp_path):
    campaign = Campaign(server, case, tmp_path, SEED)
    campaign.run(KILLS)
    print(f"{case}: {campaign.kills} kills, {campaign.finished} runs finished, seed {SEED}")


@pytest.mark.slow
def test_workers_killed_and_run_again(server, known, tmp_path):
    """Fewer times: each run starts new Pythons. They are in sessions of their own, and end when their caller does."""
    case = known["quantize quark-int8"]
    case = dataclasses.replace(case, arguments=[*case.arguments, "--workers", 2], in_a_row=10)
    Campaign(server, case, tmp_path, SEED).run(10)


@pytest.mark.parametrize("name", ["quantize quark-int8", "imatrix --write"])
def test_killed_a_few_times(light_server, known, name, tmp_path):
    Campaign(light_server, known[name], tmp_path, SEED).run(5)
