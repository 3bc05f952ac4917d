"""EXL3 on a CPU for few rows: the reference's bits, and products that depend on nothing but their operands."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from exl3_weights import FORMATS, packed
from gemma4q_kernels.exl3 import CODEBOOKS, Exl3Weight, cpu, cpu_few_rows, linear, reference
from llvmlite.binding import ffi
from tolerances import EXL3_LINEAR, rms_error


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores how many threads torch has."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def multiply(x: torch.Tensor, weight: Exl3Weight) -> torch.Tensor:
    """[M, in] to [M, out], without rotations."""
    return cpu_few_rows.multiply(x.t(), weight.trellis.view(torch.int32), weight.codebook).t()


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_every_state_has_the_bits_of_the_reference(codebook: str) -> None:
    """A tile of 8 bits has 128 states in units of 16 bits of their own: 512 tiles hold all states."""
    order = torch.arange(1 << 16).view(512, 64, 2).flip(-1).to(torch.int16)  # the upper half of a word comes first
    weight = Exl3Weight(order.view(8, 64, 128), *(torch.ones(size).half() for size in (128, 1024)), codebook)
    assert len(reference.states(weight.trellis).unique()) == 1 << 16
    assert torch.equal(multiply(torch.eye(128), weight), reference.decode(weight.trellis, codebook).float())


@pytest.mark.parametrize("columns", [8, 16, 24])
@pytest.mark.parametrize(("codebook", "width"), FORMATS)
def test_every_format_has_the_bits_of_the_reference(
    codebook: str, width: int, columns: int, poisoned_memory: None
) -> None:
    weight = packed(codebook, width, 8, columns)
    assert torch.equal(multiply(torch.eye(128), weight), reference.decode(weight.trellis, codebook).float())


@pytest.mark.parametrize(("codebook", "width"), FORMATS)
def test_every_format_is_multiplied(codebook: str, width: int, poisoned_memory: None) -> None:
    weight, x = packed(codebook, width, 16, 8), torch.randn(3, 256)
    expected = linear(x.double().float(), [weight], backend="reference")
    assert rms_error(linear(x, [weight]), expected) <= EXL3_LINEAR[torch.float32]
    flipped = weight.trellis.clone()
    flipped[-1, -1, -1] ^= 1
    for broken in (
        Exl3Weight(flipped, weight.suh, weight.svh, codebook),
        Exl3Weight(weight.trellis, weight.suh, weight.svh * 1.1, codebook),
    ):
        assert rms_error(linear(x, [broken]), expected) > EXL3_LINEAR[torch.float32]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 17, 48, 49])
def test_any_number_of_rows(rows: int, poisoned_memory: None) -> None:
    """In more than one piece of inputs, the last one short; the last rows of activations on their own."""
    weight, x = packed("mcg", 48, 136, 24), torch.randn(rows, 2176)
    expected = linear(x, [weight], backend="reference")
    assert rms_error(linear(x, [weight]), expected) <= EXL3_LINEAR[torch.float32]
    other = x.clone()
    other[-1, -1] += 1
    assert rms_error(linear(other, [weight]), expected) > EXL3_LINEAR[torch.float32]


def test_rows_are_counted_over_all_leading_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        cpu_few_rows, "multiply", lambda x, *rest: seen.append(x.shape[1]) or torch.zeros(128, x.shape[1])
    )
    for rows in (1, 24, 25):
        linear(torch.zeros(rows, 2, 128), [packed("mcg", 16)])
    assert seen == [2, 48]


def test_shards_of_different_bits_and_layouts_in_memory() -> None:
    """A row among others, transposed, and a trellis that begins in the middle of a word."""
    shards = [packed("mcg", 64, 16, 24), packed("mul1", 40, 16, 8), packed("3inst", 128, 16, 8)]
    x = torch.randn(256, 7).t()[::3]
    expected = linear(x, shards, backend="reference")
    assert rms_error(linear(x, shards), expected) <= EXL3_LINEAR[torch.float32]
    assert torch.equal(linear(x, shards), linear(x.contiguous(), shards))
    first = shards[0]
    odd = torch.empty(first.trellis.numel() + 1, dtype=torch.int16)[1:].view(first.trellis.shape).copy_(first.trellis)
    moved = Exl3Weight(odd, first.suh, first.svh, "mcg")
    assert torch.equal(linear(x, [moved]), linear(x, [first]))


def test_what_is_not_finite_stays_in_its_row() -> None:
    x, weight = torch.randn(6, 128), packed("mul1", 56)
    x[1, 5], x[4, 127] = float("nan"), float("inf")
    got = linear(x, [weight])
    assert got.isfinite().all(dim=1).tolist() == [True, False, True, True, False, True]
    assert not got[[1, 4]].isfinite().any()


def test_results_do_not_depend_on_threads(threads: None, poisoned_memory: None) -> None:
    weight, x = packed("mcg", 64, 136, 24), torch.randn(5, 2176)
    found = []
    for count in (1, 2, 3, 1, 64):
        torch.set_num_threads(count)
        found.append(multiply(x, weight))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_two_callers_at_a_time(threads: None) -> None:
    torch.set_num_threads(2)
    weights, x = [packed("mcg", width, 128, 16) for width in (32, 64)], torch.randn(1, 2048)
    expected = [multiply(x, weight) for weight in weights]
    found: list[list[torch.Tensor]] = [[], []]

    def call(index: int) -> None:
        found[index] += [multiply(x, weights[index]) for _ in range(10)]

    callers = [threading.Thread(target=call, args=(index,)) for index in (0, 1)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for results, right in zip(found, expected, strict=True):
        assert len(results) == 10 and all(torch.equal(result, right) for result in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_threads_of_its_own(threads: None) -> None:
    torch.set_num_threads(2)
    weight, x = packed("mcg", 64, 128, 16), torch.randn(1, 2048)
    words = weight.trellis.view(torch.int32)
    expected = multiply(x, weight)
    torch.set_num_threads(1)  # OpenMP's own threads do not outlive a fork
    assert list(cpu_few_rows._pool(1, os.getpid()).map(abs, [-1])) == [1]
    child = os.fork()
    if child == 0:
        pool = cpu_few_rows._pool(1, os.getpid())
        alive = list(pool.map(lambda each: each + 1, range(4))) == [1, 2, 3, 4]
        same = torch.equal(cpu_few_rows.multiply(x.t(), words, "mcg").t(), expected)
        os._exit(0 if alive and same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


BOUND = """
import os, threading, torch
from gemma4q_kernels.exl3.cpu_few_rows import allowed_cpus
cpus, ready, done = sorted(os.sched_getaffinity(0)), threading.Event(), threading.Event()
def wait():
    os.sched_setaffinity(0, cpus[-1:])
    ready.set()
    done.wait()
torch.set_num_threads(len(cpus) + 1)
other = threading.Thread(target=wait)
other.start()
ready.wait()
os.sched_setaffinity(0, cpus[:1])
assert allowed_cpus() == {cpus[0], cpus[-1]}, allowed_cpus()
torch.set_num_threads(1)
assert allowed_cpus() == {cpus[0]}, allowed_cpus()
done.set()
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no binding to CPUs on this system")
def test_a_caller_bound_to_one_cpu_does_not_bind_the_others() -> None:
    """Threads that vLLM binds, one to a CPU, are those of OpenMP; the current one is among them."""
    subprocess.run([sys.executable, "-c", BOUND], check=True)


def test_numba_is_imported_by_the_first_product() -> None:
    code = "import sys, gemma4q_kernels.exl3; assert not {'numba', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_llvmlite_answers_vllm() -> None:
    """vLLM asks what all modules hold for their `__dict__`, and starts no second engine where one is not a dict."""
    assert vars(ffi.lib) == {}


def test_without_numba_blocks_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = packed("mcg", 64), torch.randn(1, 128)
    monkeypatch.setattr(cpu, "_has_numba", lambda: False)
    monkeypatch.delattr(cpu_few_rows, "multiply")
    expected = linear(x, [weight], backend="reference")
    assert rms_error(linear(x, [weight]), expected) <= EXL3_LINEAR[torch.float32]
