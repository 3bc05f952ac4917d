"""A diagnosis for people and for programs."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gguf_mixed.errors import one_line
from vllm_gemma4q.doctor.checks.coverage import coverage
from vllm_gemma4q.doctor.checks.parallel import largest_of_all
from vllm_gemma4q.doctor.diagnose import Diagnosis
from vllm_gemma4q.doctor.subject import Subject

if TYPE_CHECKING:
    from gguf_mixed.tensors import Inventory


def as_json(patient: "Subject | Inventory", asked: Sequence[Diagnosis], others: Sequence[Diagnosis]) -> dict[str, Any]:
    """One document.

    Args:
        asked: engines whose verdict decides.
        others: engines of which only the verdict is told.
    """
    engines = [
        {
            "engine": one.engine.name,
            "version": one.engine.version,
            "device": one.engine.device.value,
            "ranks": one.engine.ranks,
            "expert_parallel": one.engine.expert_parallel,
            "asked": one in asked,
            "verdict": one.verdict.name.lower(),
            "findings": [finding.as_json() for finding in one.findings],
        }
        for one in (*asked, *others)
    ]
    return {**_facts(patient), "engines": engines}


def _facts(patient: "Subject | Inventory") -> dict[str, Any]:
    if not isinstance(patient, Subject):
        return {"checkpoint": str(patient.path), "scheme": "gguf", "tensors": len(patient.tensors)}
    shares = {role: {"quantized": quantized, "parameters": total, "share": quantized / total if total else 0.0}
              for role, (quantized, total) in coverage(patient).items()}  # fmt: skip
    architecture = patient.architecture
    return {
        "checkpoint": str(patient.folder),
        "scheme": patient.scheme.value,
        "tensors": len(patient.tensors),
        "coverage": shares,
        "largest_tp": largest_of_all(architecture, expert_parallel=False),
        "largest_tp_with_expert_parallel": largest_of_all(architecture, expert_parallel=True),
    }


def lines(patient: "Subject | Inventory", asked: Sequence[Diagnosis], others: Sequence[Diagnosis]) -> Iterator[str]:
    """Text for a terminal, whatever names are in the files."""
    return map(one_line, _lines(patient, asked, others))


def _lines(patient: "Subject | Inventory", asked: Sequence[Diagnosis], others: Sequence[Diagnosis]) -> Iterator[str]:
    facts = _facts(patient)
    yield f"{facts['checkpoint']}: {facts['scheme']}, {facts['tensors']:,} tensors"
    if shares := facts.get("coverage"):
        yield "quantized: " + ", ".join(f"{role} {one['share']:.1%}" for role, one in shares.items())
        yield f"tensor parallel: up to {facts['largest_tp']}" + (
            f", with expert parallelism up to {facts['largest_tp_with_expert_parallel']}"
            if facts["largest_tp_with_expert_parallel"] != facts["largest_tp"] else ""
        )  # fmt: skip
    for one in asked:
        yield ""
        yield f"{_label(one)}: {one.verdict}"
        for finding in one.findings:
            yield f"  {finding.severity}  {finding.code}  {finding.line}"
            yield f"      {finding.reason}"
            if finding.fix:
                yield f"      fix: {finding.fix}"
    if others:
        yield ""
    for one in others:
        why = f"  (--engine {one.engine.name} tells why)" if one.findings else ""
        yield f"{_label(one)}: {one.verdict}{why}"


def _label(one: Diagnosis) -> str:
    engine = one.engine
    ranks = f", {engine.ranks} ranks" if engine.ranks > 1 else ""
    return f"{engine.label} on {engine.device.upper()}{ranks}{', experts apart' if engine.expert_parallel else ''}"
