"""Sizes as people type them: `5GB` is 5 * 10**9 bytes, `5GiB` is 5 * 2**30."""

from pydantic import ByteSize, TypeAdapter, ValidationError

from vllm_gemma4q.errors import InputError


def parse_size(text: str) -> int:
    """Bytes that a size stands for.

    Raises:
        InputError: not a positive number with an optional unit.
    """
    try:
        n_bytes = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        n_bytes = 0
    if n_bytes <= 0:
        raise InputError(f"size {text!r}: expected a positive number with a unit, such as 5GB or 500MiB")
    return n_bytes
