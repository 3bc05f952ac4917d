"""Convert SRC to DST and kill this very process when the Nth block has been consumed (0: never).

python killed_run.py SRC DST N [DROP_MAP]      quantizes to INT8, or prunes by a drop map
"""

import os
import signal
import sys
from itertools import count
from pathlib import Path

from gguf_mixed.drop_map import read_drop_map
from vllm_gemma4q.architecture import parse_text_architecture
from vllm_gemma4q.checkpoint import Checkpoint, open_checkpoint
from vllm_gemma4q.checkpoint.convert import Conversion, convert
from vllm_gemma4q.pruned_moe import prune
from vllm_gemma4q.quark_int8 import quantize

# The package has a function of that name, so the module is only to be had here.
sys.modules["vllm_gemma4q.checkpoint.rewrite"].BLOCK_BYTES = 1 << 16


def plan(source: Checkpoint, drop_map: list[str]) -> Conversion:
    if not drop_map:
        return quantize.plan(source, max_shard_bytes=60_000)
    architecture = parse_text_architecture(source.config)
    assert architecture.num_experts is not None
    retained = read_drop_map(Path(drop_map[0]), architecture.num_experts, len(architecture.layers), 1)
    return prune.plan(source, retained, prune.Options(soft_transfer=0.3), max_shard_bytes=60_000)


source, target, kill_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
blocks = count(1)


def progress(n_bytes: int) -> None:
    if next(blocks) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)


convert(plan(open_checkpoint(source), sys.argv[4:]), target, ["test"], progress)
print(next(blocks) - 1)
