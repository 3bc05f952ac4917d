"""The checkpoint that is examined: a folder, read as far as it can be, and what all checks ask about it.

Unlike `open_checkpoint`, a folder with missing or damaged shards or a stale index is still read; what is wrong with it
becomes `problems`. Only a folder of which nothing can be said is refused.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from vllm_gemma4q.architecture import Role, TextArchitecture, parse_text_architecture, role_of
from vllm_gemma4q.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from vllm_gemma4q.checkpoint.header import read_header, read_json
from vllm_gemma4q.checkpoint.reader import CONFIG, INDEX, PICKLE_SUFFIXES
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.exl3 import facts as exl3
from vllm_gemma4q.exl3.scheme import METHOD as EXL3_METHOD
from vllm_gemma4q.fp8_static import facts as fp8
from vllm_gemma4q.fp8_static.ignore import IgnoreList
from vllm_gemma4q.fp8_static.scheme import ignored_names, is_fp8_static
from vllm_gemma4q.module_headers import relative_name
from vllm_gemma4q.name_patterns import compile_pattern, names_of
from vllm_gemma4q.quark_int8 import facts as int8
from vllm_gemma4q.quark_int8.scheme import is_w8a8_int8
from vllm_gemma4q.restore.formats import METHODS

CODES = frozenset({"I8", "F8_E4M3", "F8_E5M2"})
# Ends of the names of weights of which an element holds several: compressed-tensors', and GPTQ's and AWQ's.
PACKED = (".weight_packed", ".qweight")


class Scheme(StrEnum):
    """What config.json says the weights are."""

    UNQUANTIZED = "unquantized"
    INT8 = "quark-int8"
    FP8 = "fp8-static"
    EXL3 = "exl3"
    OTHER = "other"


class Problem(NamedTuple):
    """Something wrong with the folder itself."""

    code: str
    subject: str
    found: str
    expected: str


@dataclass(frozen=True)
class Subject:
    """A checkpoint folder.

    Attributes:
        base: the one that it was made from, where the user gave it.
    """

    folder: Path
    config: Mapping[str, Any]
    architecture: TextArchitecture
    tensors: Mapping[str, TensorInfo]
    problems: Sequence[Problem]
    pickles: Sequence[str]
    base: Checkpoint | None = None

    @cached_property
    def quantization(self) -> Mapping[str, Any]:
        """`quantization_config`, empty where there is none."""
        return self.config.get("quantization_config") or {}

    @cached_property
    def scheme(self) -> Scheme:
        if not self.quantization:
            return Scheme.UNQUANTIZED
        if self.quantization.get("quant_method") == EXL3_METHOD:
            return Scheme.EXL3
        if is_w8a8_int8(self.quantization):
            return Scheme.INT8
        return Scheme.FP8 if is_fp8_static(self.quantization) else Scheme.OTHER

    @property
    def is_claimed(self) -> bool:
        """Whether the plugin serves the scheme itself; all else is stock vLLM's."""
        return self.scheme not in (Scheme.UNQUANTIZED, Scheme.OTHER)

    @cached_property
    def ignored(self) -> tuple[str, ...]:
        """The list of modules that are not quantized, in the words of the file."""
        return _listed(self.quantization)

    @cached_property
    def roles(self) -> Mapping[str, Role]:
        """The role of every tensor, by full name: a mixture has 30,000."""
        return {name: role_of(name) for name in self.tensors}

    @cached_property
    def names(self) -> Mapping[str, TensorInfo]:
        """Tensors by their names relative to the language model's root."""
        return {relative_name(name): tensor for name, tensor in self.tensors.items()}

    @cached_property
    def facts(self) -> int8.Facts | fp8.Facts | exl3.Facts | None:
        """What the plugin makes of the headers; None where it refuses them or leaves the scheme to vLLM."""
        return self._verdict[0]

    @cached_property
    def refusal(self) -> str | None:
        """Why the plugin refuses the checkpoint."""
        return self._verdict[1]

    @cached_property
    def _verdict(self) -> tuple[int8.Facts | fp8.Facts | exl3.Facts | None, str | None]:
        """As the plugin's `maybe_update_config` finds it, with the same functions."""
        if not self.is_claimed:
            return None, None
        try:
            # Headers are read again only for the plugin's own words on what is wrong with them.
            tensors = open_checkpoint(self.folder).tensors if self.problems else self.tensors
            if self.scheme is Scheme.INT8:
                return int8.read_facts(self.architecture, tensors), None
            if self.scheme is Scheme.EXL3:
                return exl3.read_facts(self.architecture, tensors), None
            return fp8.read_facts(self.architecture, tensors, IgnoreList(self.ignored)), None
        except InputError as error:
            return None, str(error)

    @property
    def path(self) -> str:
        """For commands."""
        return shlex.quote(str(self.folder))

    @property
    def base_path(self) -> str:
        return "BASE" if self.base is None else shlex.quote(str(self.base.folder))

    @property
    def restore(self) -> str:
        """The command that mends what a quantizer did to a checkpoint; one that makes it anew where there is none."""
        if self.scheme is Scheme.UNQUANTIZED:
            return self.download
        if self.quantization.get("quant_method") not in METHODS:
            return self.requantize
        target = shlex.quote(f"{self.folder}-restored")
        return f"gemma4q restore {self.path} {self.base_path} {target}"

    @property
    def requantize(self) -> str:
        """The command that makes the checkpoint anew."""
        scheme = self.scheme if self.is_claimed else Scheme.INT8
        more = {Scheme.FP8: " --statistics STATS", Scheme.EXL3: " --bits 4 --statistics STATS"}.get(scheme, "")
        target = shlex.quote(f"{self.folder}-again")
        return f"gemma4q quantize {self.base_path} {target} --scheme {scheme}{more}"

    @property
    def download(self) -> str:
        return f"hf download REPOSITORY --local-dir {self.path}"


def open_subject(folder: Path, base: Path | None) -> Subject:
    """Read a folder's configuration and headers, and those of its base.

    Raises:
        InputError: no folder, no readable config.json of a Gemma 4, or no safetensors file of which a header can be
            read; an index of no use; an unreadable base.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder, nor a .gguf file")
    config = read_json(folder / CONFIG)
    architecture = parse_text_architecture(config)
    _check_quantization(config)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    weight_map = read_json(folder / INDEX).get("weight_map") if (folder / INDEX).exists() else None
    if weight_map is not None and not _is_weight_map(weight_map):
        raise InputError(f"{INDEX}: weight_map: got {type(weight_map).__name__}, expected file names by tensor")
    problems: list[Problem] = []
    tensors = _read_shards(folder, weight_map, problems)
    if not tensors:
        found = f"only pickle files ({pickles[0]}), which are never opened" if pickles else "none"
        raise InputError(f"{folder}: safetensors weights expected, found {found}")
    if weight_map is not None:
        problems += _stale_entries(weight_map, tensors, {problem.subject for problem in problems})
    opened = None if base is None else open_checkpoint(base)
    return Subject(folder, config, architecture, tensors, problems, pickles, opened)


def _check_quantization(config: Mapping[str, Any]) -> None:
    """Raises InputError: an entry that is no object, or whose list holds a pattern that nobody should match."""
    for key in ("quantization_config", "vision_config"):
        if not isinstance(found := config.get(key) or {}, Mapping):
            raise InputError(f"config.json: {key} is {found!r}, expected an object")
    quantization = config.get("quantization_config") or {}
    for entry in _listed(quantization):
        if entry.startswith("re:"):
            compile_pattern(entry)


def _listed(quantization: Mapping[str, Any]) -> tuple[str, ...]:
    exclude = quantization.get("exclude")
    return names_of("exclude", exclude) if exclude else ignored_names(quantization)


def _is_weight_map(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(file, str) for file in value.values())


def _read_shards(folder: Path, weight_map: Mapping[str, str] | None, problems: list[Problem]) -> dict[str, TensorInfo]:
    """Headers of all shards that are there and whole; adds what is wrong with the others."""
    present = {path.name for path in folder.glob("*.safetensors")}
    shards = sorted(present if weight_map is None else set(weight_map.values()))
    if weight_map is None and len(shards) > 1:
        problems.append(Problem("no-index", INDEX, "nothing (missing)", f"the shards of {len(shards)} files"))
    tensors: dict[str, TensorInfo] = {}
    for name in shards:
        if name not in present:
            problems.append(Problem("missing-shard", name, "nothing (missing)", "the file that the index names"))
            continue
        try:
            header = read_header(folder / name)
        except InputError as error:
            problems.append(Problem("damaged-shard", name, str(error).removeprefix(f"{name}: "), "a whole file"))
            continue
        for key, tensor in header.items():
            if key in tensors:
                found = f"two copies, in {tensors[key].path.name} and {name}"
                problems.append(Problem("stored-twice", key, found, "one"))
            tensors[key] = tensor
    return tensors


def _stale_entries(
    weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo], bad_shards: set[str]
) -> list[Problem]:
    """Where the index and the shards that could be read disagree."""
    problems = []
    for name, shard in weight_map.items():
        if shard in bad_shards:
            continue
        if name not in tensors:
            problems.append(Problem("stale-index", name, "no such tensor", f"one in {shard}, as {INDEX} says"))
        elif tensors[name].path.name != shard:
            found = f"it in {tensors[name].path.name}"
            problems.append(Problem("stale-index", name, found, f"{shard}, as {INDEX} says"))
    for name, tensor in tensors.items():
        if name not in weight_map:
            problems.append(Problem("stale-index", name, f"it in {tensor.path.name}", f"an entry in {INDEX}"))
    return problems
