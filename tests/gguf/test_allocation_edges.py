"""Allocation where two runs meet, weights change far inside a tensor, or noise comes out below zero."""

import contextlib

import numpy as np
import pytest
from gemma4q_kernels.ggml import GGMLQuantizationType
from gguf_files import BF16, F32, write_gguf

from gguf_mixed import allocation
from gguf_mixed.error_cache import ErrorCache
from gguf_mixed.errors import InputError
from gguf_mixed.measure import measure
from gguf_mixed.recipes.base import Material
from gguf_mixed.sensitivity import measured_table, uniform
from gguf_mixed.tensors import Tensor, read_inventory

T = GGMLQuantizationType
NAME = "blk.0.ffn_up.weight"


def test_the_default_cache_is_held_from_the_first_look_on(tmp_path, monkeypatch):
    """A run that starts while another is getting ready does not take it from that one, and goes on without."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    inventory = read_inventory(write_gguf(tmp_path / "m.gguf", [(NAME, (256, 8), BF16)], random_weights=True))
    load = allocation.load_quantizers

    def during(folder):
        (cache,) = tmp_path.rglob("*.jsonl")
        with pytest.raises(InputError, match="another run is writing here"):
            ErrorCache(cache)
        return load(folder)

    monkeypatch.setattr(allocation, "load_quantizers", during)
    table = allocation.error_table(Material(inventory), uniform(), [T.Q8_0])
    assert set(table.by_tensor) == {NAME}
    (cache,) = tmp_path.rglob("*.jsonl")
    with contextlib.closing(ErrorCache(cache)):
        assert cache.read_text().count("\n") == 2


def test_a_change_far_inside_a_tensor_is_noticed(quantizers, tmp_path):
    path, cache = tmp_path / "m.gguf", tmp_path / "errors.jsonl"
    inventory = read_inventory(write_gguf(path, [(NAME, (256, 4096), F32)], random_weights=True))
    before = measure(inventory, quantizers, uniform(), types=[T.Q4_0], cache=cache)
    stored = np.memmap(path, np.float32, "r+", inventory.tensors[NAME].start, (4096, 256))
    stored[3500:] *= 2
    stored.flush()
    after = measure(inventory, quantizers, uniform(), types=[T.Q4_0], cache=cache)
    assert after == measure(inventory, quantizers, uniform(), types=[T.Q4_0]) != before


def test_noise_below_zero_is_noise(tmp_path):
    path = tmp_path / "kld.csv"
    names = ("blk.0.a.weight", "blk.0.b.weight", "blk.0.c.weight")
    path.write_text(f"QTYPE,{','.join(names)}\nq8_0,-0.05,-0.04,0.001\nq3_k,0.05,0.06,1e-9\n")
    with pytest.raises(InputError, match="0.05 at the coarsest type and 0.04 at Q8_0: noise within"):
        measured_table(path)
    forced = measured_table(path, force=True)
    found = [forced.of(Tensor(name, (64, 8), BF16, path, 0)).anchor.nats for name in names]
    assert found == [0.05, 0.06, 0.04]
