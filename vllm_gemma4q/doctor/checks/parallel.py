"""Whether ranks divide the model, and how many do.

Heads, the dense feed-forward size and, without expert parallelism, the experts' have to be divided evenly; key heads
may also be a divisor of the ranks. EXL3 divides alike: ranks that meet inside a block both hold it.
"""

from collections.abc import Iterator
from dataclasses import replace

from vllm_gemma4q.architecture import TextArchitecture
from vllm_gemma4q.doctor.engines import Engine
from vllm_gemma4q.doctor.finding import Finding, Severity
from vllm_gemma4q.doctor.subject import Subject
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.vram.weights import vllm_bytes


def check(subject: Subject, engine: Engine) -> Iterator[Finding]:
    """The ranks that were asked for."""
    if not engine.is_vllm:
        return
    reason = refusal(subject.architecture, engine.ranks, engine.expert_parallel)
    if reason is not None:
        most = largest(subject.architecture, engine.ranks, engine.expert_parallel)
        spread = " --enable-expert-parallel" if engine.expert_parallel else ""
        fix = f"vllm serve {subject.path} --tensor-parallel-size {most}{spread}"
        found = reason.partition(": ")[2]
        yield Finding("ranks", Severity.ERROR, f"-tp {engine.ranks}", found, f"at most {most} ranks",
                      "vLLM stops", fix)  # fmt: skip


def refusal(architecture: TextArchitecture, ranks: int, expert_parallel: bool) -> str | None:
    """Why so many ranks do not work, None where they do."""
    if expert_parallel:
        architecture = replace(architecture, moe_intermediate_size=None)
    try:
        vllm_bytes(architecture, (), ranks)
    except InputError as error:
        return str(error)
    return None


def largest(architecture: TextArchitecture, ranks: int, expert_parallel: bool) -> int:
    """The most ranks, up to a number, that work; one always does."""
    return next(count for count in range(ranks, 0, -1) if refusal(architecture, count, expert_parallel) is None)


def largest_of_all(architecture: TextArchitecture, expert_parallel: bool) -> int:
    """The most ranks that work; each has a head at least."""
    return largest(architecture, architecture.num_attention_heads, expert_parallel)
