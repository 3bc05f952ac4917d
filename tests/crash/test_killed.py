"""Every command that writes, killed at random moments and run again: the files of an unbroken run, and nothing else.

Every second kill comes at a moment of the run's time, the others just before, or in the middle of, a change of a file.
GEMMA4Q_CRASH_KILLS (50) and GEMMA4Q_CRASH_SEED (0) make longer campaigns, and others. What runs leave out to be quick
is in quick.py.
"""

import pytest
from crash_cases import CASES, ONLY_KILLED
from crash_runs import KILLS, SEED, Campaign

REAL_WORKERS = 10


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *ONLY_KILLED], indirect=True)
def test_killed_and_run_again(server, case, place):
    campaign = Campaign(server, case, place, SEED)
    campaign.run(KILLS)
    print(f"{case}: {campaign.kills} kills, {campaign.finished} runs finished, seed {SEED}")


@pytest.mark.slow
def test_killed_on_a_disk(server, known, tmp_path):
    """The others may be in memory: one whose files come one by one, where it is slow to write them."""
    Campaign(server, known["quantize quark-int8"], tmp_path, SEED + 1).run(KILLS)


@pytest.mark.slow
def test_real_workers_killed_and_run_again(light_server, known, place):
    """Workers that are new Pythons, as users have them. Those take 3 seconds each to start, so these are few kills:
    the 50 of "quantize --workers" have forks in their place, with everything else the same (see quick.py)."""
    Campaign(light_server, known["quantize --workers"], place, SEED).run(REAL_WORKERS)


@pytest.mark.parametrize("name", ["quantize quark-int8", "imatrix --write"])
def test_killed_a_few_times(light_server, known, name, tmp_path):
    Campaign(light_server, known[name], tmp_path, SEED).run(5)
