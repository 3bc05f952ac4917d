"""Sound checkpoints of each format and the BF16 ones that they were made from, made once."""

import pytest
from made_statistics import write_for
from synthetic import small_config, write_checkpoint

from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.fp8_static import quantize as fp8_static
from vllm_gemma4q.fp8_static.format import Granularity
from vllm_gemma4q.quark_int8 import quantize as quark_int8


@pytest.fixture(scope="session", params=["dense", "moe"])
def kind(request):
    return request.param


@pytest.fixture(scope="session")
def sound(kind, tmp_path_factory):
    """A folder with `base`, `fp8` and `int8`, and `channels` (compressed-tensors) where it is dense."""
    folder = tmp_path_factory.mktemp(kind)
    base = open_checkpoint(write_checkpoint(folder / "base", small_config(moe=kind == "moe"), shards=3))
    write_for(folder / "base", folder / "statistics")
    made = {"fp8": fp8_static.plan(base, folder / "statistics"), "int8": quark_int8.plan(base)}
    if kind == "dense":
        options = fp8_static.Options(granularity=Granularity.CHANNEL)
        made["channels"] = fp8_static.plan(base, folder / "statistics", options)
    for name, conversion in made.items():
        assert convert(conversion, folder / name, ["test"], lambda _: None)
    return folder
