"""Of all that vLLM's processes print when they die, the line that a user needs."""

import pytest

from vllm_gemma4q.evaluation.server import last_error

PREFIX = "(Worker pid=31689) ERROR 11-30 17:15:56 [multiproc_executor.py:1063] "
DEAD = "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above)."
FAILED = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (["Python.h:1: warning", f"{PREFIX}main.cpp:46:10: fatal error: Python.h: No such file or directory",
          f"{PREFIX}torch._inductor.exc.InductorError: CppCompileError: C++ compile error", DEAD],
         "main.cpp:46:10: fatal error: Python.h: No such file or directory"),
        ([f"{PREFIX}    raise InputError(", f"{PREFIX}InputError: tensor X: missing", FAILED, DEAD],
         "InputError: tensor X: missing"),
        (["pydantic_core.ValidationError: 1 validation error for ModelConfig", "  Value error, no model [type=value]"],
         "pydantic_core.ValidationError: 1 validation error for ModelConfig Value error, no model"),
        (["hello", "last words", ""], "last words"),
        ([], "nothing printed"),
    ],
    ids=["compiler", "worker", "pydantic", "no error", "silence"],
)  # fmt: skip
def test_the_cause(tmp_path, lines, found):
    log = tmp_path / "vllm.log"
    log.write_text("\n".join(lines))
    assert last_error(log) == f"{found} (see {log})"
