"""Rows of INT8 linears that stock vLLM cannot pack for AMX.

On a CPU with AMX vLLM 0.32 packs an int8 weight of which K is a multiple of 32 and N of 16, N and K being a rank's, in
blocks of 32 rows; at a last one of 16 it stops. Other widths, and other processors, are oneDNN's. Source: vLLM 0.32
`layers/utils.py:check_cpu_sgl_kernel`, `csrc/cpu/sgl-kernels/gemm.cpp:pack_vnni`. The plugin does without that packing
there.

Not done: linears outside the layers' attention and feed-forward.
"""

from collections.abc import Iterator
from pathlib import Path

from vllm_gemma4q.architecture import TextArchitecture
from vllm_gemma4q.doctor.checks.parallel import refusal
from vllm_gemma4q.doctor.engines import Device, Engine
from vllm_gemma4q.doctor.finding import Finding, Severity, about
from vllm_gemma4q.doctor.subject import Scheme, Subject
from vllm_gemma4q.quark_int8.facts import INT8

_BLOCK, _TILE, _STEP_K = 32, 16, 32


def check(subject: Subject, engine: Engine) -> Iterator[Finding]:
    """An error where this machine has AMX, a note where it has not: the engine may run elsewhere."""
    if engine.has_plugin or not engine.is_vllm or engine.device is not Device.CPU or subject.scheme is not Scheme.INT8:
        return
    if not _divides(subject, engine, engine.ranks) or not (refused := _refused(subject, engine.ranks)):
        return
    works = (ranks for ranks in range(engine.ranks - 1, 0, -1)
             if _divides(subject, engine, ranks) and not _refused(subject, ranks))  # fmt: skip
    most = next(works, 0)
    names, rows = list(refused), next(iter(refused.values()))
    found = f"{rows} rows on each of {engine.ranks} ranks" if engine.ranks > 1 else f"{rows} rows"
    expected = f"a multiple of {_BLOCK}" + (f": at most {most} ranks" if most else "")
    severity = Severity.ERROR if cpu_has_amx() else Severity.NOTE
    reason = "on CPUs with AMX vLLM packs blocks of 32 rows, and stops at a last one of 16"
    fix = f"pip install vllm-gemma4q && vllm serve {subject.path}"
    yield from about("amx-rows", severity, names, found, expected, reason, fix)


def _divides(subject: Subject, engine: Engine, ranks: int) -> bool:
    return refusal(subject.architecture, ranks, engine.expert_parallel) is None


def cpu_has_amx() -> bool:
    """Whether this machine's processor has AMX."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and " amx_tile" in cpuinfo.read_text()


def _refused(subject: Subject, ranks: int) -> dict[str, int]:
    """Rows a rank of the linears that are refused, by the name of their first tensor."""
    return {
        name: rows
        for name, rows, columns in _on_a_rank(subject.architecture, ranks)
        if rows % _BLOCK and rows % _TILE == 0 and columns % _STEP_K == 0 and _is_int8(subject, name)
    }


def _is_int8(subject: Subject, name: str) -> bool:
    return name in subject.tensors and subject.tensors[name].dtype == INT8


def _on_a_rank(architecture: TextArchitecture, ranks: int) -> Iterator[tuple[str, int, int]]:
    """First tensor, N and K of every fused linear of the layers as one rank holds it. Experts are not packed so."""
    hidden = architecture.hidden_size
    for layer in architecture.layers:
        prefix = f"{architecture.root}layers.{layer.index}."
        queries = architecture.num_attention_heads * layer.head_dim // ranks
        keys = layer.num_key_value_heads * layer.head_dim // min(ranks, layer.num_key_value_heads)
        both = 2 * keys if layer.has_key_value else 0  # values that are the keys are copied
        between = layer.intermediate_size // ranks
        yield f"{prefix}self_attn.q_proj.weight", queries + both, hidden
        yield f"{prefix}self_attn.o_proj.weight", hidden, queries
        yield f"{prefix}mlp.gate_proj.weight", 2 * between, hidden
        yield f"{prefix}mlp.down_proj.weight", hidden, between
