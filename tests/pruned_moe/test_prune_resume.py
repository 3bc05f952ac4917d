"""Prunes killed and resumed: the same bytes as in one go. And how much memory one takes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from peak_memory import measure
from prune_files import EXAMPLE, retained
from pruned_checkpoints import NON_UNIFORM, UNIFORM
from synthetic import CONFIG_26B_A4B, shapes, write_header_only

from gguf_mixed.drop_map import RetainedExperts
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.checkpoint.run import JOURNAL
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.pruned_moe.prune import Options, plan

SCRIPT = Path(__file__).resolve().parents[1] / "checkpoint" / "killed_run.py"
MB = 1_000_000


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def drop_map(tmp_path):
    path = tmp_path / "drop.json"
    path.write_text(json.dumps(retained(NON_UNIFORM).to_json()))
    return path


def command(target, drop_map, kill_at=0):
    return [sys.executable, SCRIPT, EXAMPLE, target, str(kill_at), drop_map]


def test_killed_again_and_again_and_resumed_is_byte_identical(tmp_path, drop_map):
    subprocess.run(command(tmp_path / "whole", drop_map), check=True, stdout=subprocess.DEVNULL)
    finished, kill_at = [], 60
    while subprocess.run(command(tmp_path / "target", drop_map, kill_at), check=False).returncode == -signal.SIGKILL:
        assert not (tmp_path / "target" / "config.json").exists()
        assert (tmp_path / "target" / JOURNAL).exists()
        finished.append(len(list((tmp_path / "target").glob("*.safetensors"))))
        kill_at += 50
    assert len(finished) >= 2
    assert finished == sorted(set(finished))
    assert content(tmp_path / "target") == content(tmp_path / "whole")


def test_another_map_or_option_does_not_resume(tmp_path, drop_map):
    """Nor is a finished prune of another map taken for done."""
    subprocess.run(command(tmp_path / "target", drop_map, 60), check=False)
    source, before = open_checkpoint(EXAMPLE), content(tmp_path / "target")
    same = {"options": Options(soft_transfer=0.3), "max_shard_bytes": 60_000}
    for kept, changes in ((UNIFORM, {}), (NON_UNIFORM, {"options": Options(soft_transfer=0.2)})):
        with pytest.raises(InputError, match="unfinished run with another plan"):
            convert(plan(source, retained(kept), **(same | changes)), tmp_path / "target", ["test"], lambda _: None)
    assert content(tmp_path / "target") == before
    finish = plan(source, retained(NON_UNIFORM), **same)
    assert convert(finish, tmp_path / "target", ["test"], lambda _: None)
    assert not convert(finish, tmp_path / "target", ["test"], lambda _: None)
    with pytest.raises(InputError, match="not empty"):
        convert(plan(source, retained(UNIFORM)), tmp_path / "target", ["test"], lambda _: None)


@pytest.mark.slow
def test_peak_memory_is_bounded_whatever_the_largest_tensor(tmp_path):
    """One layer of the 26B: experts of 1.0 and 0.5 GB (of zeros, so it is read fast), every other one dropped."""
    text = {
        **CONFIG_26B_A4B["text_config"],
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "vocab_size": 64,
    }
    config = {**CONFIG_26B_A4B, "text_config": text, "vision_config": None}
    source = write_header_only(tmp_path / "source", config, shapes(config).items())
    path = tmp_path / "drop.json"
    path.write_text(json.dumps(RetainedExperts(128, (tuple(range(0, 128, 2)),)).to_json()))
    peak = measure([sys.executable, SCRIPT, source, tmp_path / "target", "0", path]).peak_bytes
    assert (tmp_path / "target" / "config.json").exists()
    assert peak < 500 * MB, "the stream should hold blocks, not experts"
