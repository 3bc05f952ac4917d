"""EXL3's own: an output layer beside a configuration that ties it, and the file that repeats what headers say."""

from collections.abc import Iterator

from vllm_gemma4q.checkpoint.header import read_json
from vllm_gemma4q.doctor.engines import EXLLAMAV3, Engine
from vllm_gemma4q.doctor.finding import Finding, Severity, about
from vllm_gemma4q.doctor.subject import Scheme, Subject
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.exl3.storage import FILE, disagreements


def check(subject: Subject, engine: Engine) -> Iterator[Finding]:
    """Head and storage file."""
    if subject.scheme is not Scheme.EXL3:
        return
    if "lm_head.trellis" in subject.tensors and subject.architecture.tie_word_embeddings:
        reason = (
            "the plugin and ExLlamaV3 use the output layer of the file; engines that tie it to the embeddings do not"
        )
        found = "an output layer of its own"
        yield Finding("head-untied", Severity.NOTE, "lm_head", found, "none, for tie_word_embeddings is true", reason)
    if not (subject.folder / FILE).is_file():
        return
    try:
        storage = read_json(subject.folder / FILE).get("tensor_storage", {})
    except InputError as error:
        storage, problem = None, str(error)
    else:
        problem = f"tensor_storage: got {type(storage).__name__}"
    if not isinstance(storage, dict):
        yield Finding("storage-unreadable", Severity.ERROR, FILE, problem, "an object", "the engine stops",
                      f"rm {subject.path}/{FILE}")  # fmt: skip
        return
    wrong = disagreements(storage, subject.tensors)
    severity = Severity.WARNING if engine.name == EXLLAMAV3 else Severity.NOTE
    reason = "the plugin goes by the weights; ExLlamaV3 takes sizes from the file"
    yield from about("storage-disagrees", severity, wrong, f"another shape than {FILE} says", "the same", reason,
                     subject.requantize)  # fmt: skip
