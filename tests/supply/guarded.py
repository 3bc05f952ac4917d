"""Run a command without a network: in a network namespace of its own where that is permitted, and watched always."""

import os
import subprocess
from pathlib import Path

GUARD = Path(__file__).with_name("guard")
# Engines talk to their own processes over the loopback device, which is down in a new namespace.
NAMESPACE = ("unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
# What makes hubs and engines quiet by itself must not be what makes the test pass.
UNSET = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_NO_USAGE_STATS", "VLLM_DO_NOT_TRACK", "DO_NOT_TRACK")


def run(command: list[str], folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The finished command, and what it tried to reach: a line `EVENT HOST` each."""
    log = folder / "guard.log"
    log.write_text("")
    variables = {name: value for name, value in os.environ.items() if name not in UNSET}
    variables |= {"PYTHONPATH": str(GUARD), "GUARD_LOG": str(log), **environment}
    prefix = NAMESPACE if _may_unshare() else ()
    done = subprocess.run(
        [*prefix, *command], env=variables, cwd=folder, capture_output=True, text=True, check=False, timeout=600
    )
    return done, log.read_text().splitlines()


def _may_unshare() -> bool:
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False
