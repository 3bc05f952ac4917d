"""Every EXL3 kernel on a GPU: dense weights and searches to the bit, products against float64, CUDA graphs.

`make test-gpu`, or without an engine `PYTHONPATH=kernels python -m pytest -m gpu tests/gpu` where torch, Triton and
pydantic are. What the interpreter checks on CPU tensors is checked here on the GPU's, beside all that it cannot do:
bfloat16, real sizes, matrix instructions, graphs.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from gemma4q_kernels.exl3 import Exl3Weight, choose, linear, viterbi, viterbi_triton
from gemma4q_kernels.exl3.triton import FUSED_ROWS
from numerics import interpreted_exl3
from numerics.interpreted_exl3 import FORMATS, dense, packed
from tolerances import EXL3_TRITON, rms_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Inputs and outputs of the 31B, in tiles: o and qkv of sliding layers, down over two ranks.
SIZES = ((512, 336), (336, 512), (672, 336))
# Where `linear` makes weights dense in the dtype of its input, they are rounded to it once, and outputs once more.
DENSE_BOUND = {torch.float32: EXL3_TRITON[torch.float32]}
DENSE_BOUND |= {dtype: 2 * EXL3_TRITON[dtype] for dtype in DTYPES[1:]}


def test_triton_is_chosen() -> None:
    assert choose("cuda", 1, 128, 128, torch.bfloat16).name == "triton"


@pytest.mark.parametrize(("codebook", "width"), FORMATS)
def test_every_format(codebook: str, width: int) -> None:
    interpreted_exl3.check_dense(codebook, width)
    interpreted_exl3.check_product(codebook, width)
    interpreted_exl3.check_step(codebook, width)


@pytest.mark.parametrize("check", interpreted_exl3.CHECKS, ids=lambda check: check.__name__)
def test_what_the_interpreter_checks(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("codebook", "width"), [("3inst", 48), ("mcg", 64), ("mul1", 112), ("mul1", 40)])
def test_dense_weights_at_real_sizes(codebook: str, width: int, dtype: torch.dtype) -> None:
    weight = packed(codebook, width, *SIZES[0])
    expected = dense(weight, dtype, "reference")
    assert torch.equal(dense(weight, dtype, "triton"), expected)
    weight.trellis[-1, -1, -1] ^= 1
    assert not torch.equal(dense(weight, dtype, "triton"), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_linear_at_real_sizes(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Twice the same bits, within the bound that one shard's scales x 1.1 break."""
    shards = [packed("mcg", 64, *size), packed("mul1", 56, size[0], 64)]
    bias = torch.randn(sum(shard.out_features for shard in shards), dtype=dtype)
    for rows in (1, 8, 9, 16, 17, FUSED_ROWS, FUSED_ROWS + 1, 300):
        x = torch.randn(rows, 16 * size[0], dtype=dtype)
        expected = linear(x.float(), shards, bias, backend="reference")
        got = linear(x, shards, bias, backend="triton")
        bound = (EXL3_TRITON if rows <= FUSED_ROWS else DENSE_BOUND)[dtype]
        assert rms_error(got, expected) <= bound
        assert torch.equal(got, linear(x, shards, bias, backend="triton"))
        scaled = [shards[0], Exl3Weight(shards[1].trellis, shards[1].suh * 1.1, shards[1].svh, "mul1")]
        assert rms_error(linear(x, scaled, bias, backend="triton"), expected) > bound


@pytest.mark.parametrize("rows", [1, 16, FUSED_ROWS, FUSED_ROWS + 1])
def test_linear_in_a_graph(rows: int) -> None:
    """Replays see new tokens, and agree with calls outside a graph to the bit."""
    shards = [packed("mcg", 64, 176, 264), packed("mcg", 48, 176, 264)]
    x = torch.randn(rows, 2816).bfloat16()
    run = partial(linear, x, shards, backend="triton")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    before = out.clone()
    for _ in range(2):
        x.normal_()
        graph.replay()
        assert torch.equal(out, run()) and not torch.equal(out, before)


@pytest.mark.parametrize(("codebook", "width"), [("3inst", 16), ("mcg", 48), ("mcg", 64), ("mul1", 40), ("mul1", 128)])
def test_search(codebook: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The definition's states, in one batch and in several."""
    tiles = torch.randn(37, viterbi.WINDOWS)
    expected = viterbi.search(tiles, width, codebook)
    assert torch.equal(viterbi_triton.search(tiles, width, codebook), expected)
    assert not torch.equal(viterbi_triton.search(tiles * 1.1, width, codebook), expected)
    monkeypatch.setattr(viterbi_triton, "CHOICES_BYTES", viterbi_triton.choices_bytes(width) * 10)
    assert torch.equal(viterbi_triton.search(tiles, width, codebook), expected)
