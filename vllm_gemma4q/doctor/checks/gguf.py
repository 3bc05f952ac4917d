"""A GGUF file: whole, of a Gemma 4, with a chat template, and with the types that were planned.

The plan is an override table with its sidecar (`gguf_mixed.sidecar`), as `gguf-mixed plan` writes them.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path

from gguf_mixed.overrides import read_overrides
from gguf_mixed.sidecar import planned_types, read_sidecar, sidecar_path
from gguf_mixed.tensors import Inventory
from gguf_mixed.verify import find_differences
from vllm_gemma4q.doctor.engines import LLAMA_CPP, Engine
from vllm_gemma4q.doctor.finding import Finding, Severity, about
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.vram.source import GGUF_ARCHITECTURE

_TEMPLATE = "tokenizer.chat_template"
_TOKENS = "tokenizer.ggml.tokens"


def check(inventory: Inventory, overrides: Path | None, engine: Engine) -> Iterator[Finding]:
    """One file, which may consist of several.

    Args:
        overrides: the table that it was made with; None where it is not known.

    Raises:
        InputError: the table or its sidecar cannot be read.
    """
    path = shlex.quote(str(inventory.path))
    if engine.name != LLAMA_CPP:
        yield Finding("gguf", Severity.ERROR, inventory.path.name, "a GGUF file", "a folder of safetensors",
                      f"{engine.label} does not load GGUF for Gemma 4", f"llama-server -m {path}")  # fmt: skip
        return
    if inventory.architecture != GGUF_ARCHITECTURE:
        yield Finding("gguf-architecture", Severity.WARNING, "general.architecture", inventory.architecture,
                      GGUF_ARCHITECTURE, "it is another model", f"gguf-mixed inspect {path}")  # fmt: skip
    if inventory.header_only:
        expected, fix = f"{inventory.tensor_bytes:,} bytes of them", _again(inventory, overrides)
        yield Finding("gguf-without-weights", Severity.ERROR, inventory.path.name, "a header without weights", expected,
                      "llama.cpp stops", fix)  # fmt: skip
        return
    header = inventory.headers[0]
    if header.get(_TOKENS) is None:
        yield Finding("gguf-without-tokenizer", Severity.ERROR, _TOKENS, "nothing (missing)", "the vocabulary",
                      "llama.cpp stops", "convert_hf_to_gguf.py BASE --outtype bf16 --outfile MODEL.gguf")  # fmt: skip
    if header.get(_TEMPLATE) is None:
        reason = "llama.cpp frames chats in ChatML, which the model never saw"
        fix = f"llama-server -m {path} --jinja --chat-template-file BASE/chat_template.jinja"
        yield Finding("missing-chat-template", Severity.WARNING, _TEMPLATE, "nothing (missing)", "BASE's template",
                      reason, fix)  # fmt: skip
    if overrides is not None:
        yield from _planned(inventory, overrides)


def _planned(inventory: Inventory, overrides: Path) -> Iterator[Finding]:
    table = read_overrides(overrides)
    content = read_sidecar(overrides, table)
    if content is None:
        raise InputError(f"{sidecar_path(overrides).name}: missing: it holds the plan for the tensors that are kept")
    differences = find_differences(inventory.path, planned_types(content), content["file_type"])
    names = [line.partition(": ")[0] for line in differences]
    if differences:
        found, _, expected = differences[0].partition(": ")[2].partition(", expected ")
        reason = "its size and divergence are not those that were planned"
        yield from about("not-as-planned", Severity.WARNING, names, found.removeprefix("got "), expected, reason,
                         _again(inventory, overrides))  # fmt: skip


def _again(inventory: Inventory, overrides: Path | None) -> str:
    table = "overrides.txt" if overrides is None else shlex.quote(str(overrides))
    target = shlex.quote(str(inventory.path.with_suffix(".again.gguf")))
    return f"gguf-mixed quantize MODEL.gguf {target} --overrides {table} --imatrix imatrix.gguf"


def find_overrides(path: Path) -> Path | None:
    """The one override table with a sidecar beside a GGUF file; None where there is none or more."""
    tables = [table for table in sorted(path.parent.glob("*.txt")) if sidecar_path(table).is_file()]
    return tables[0] if len(tables) == 1 else None
