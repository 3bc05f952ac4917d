"""Where llama.cpp's programs are looked for."""

import pwd

import pytest

from gguf_mixed.errors import InputError
from gguf_mixed.llama_cpp import cache_folder, find_tool


def test_a_user_without_a_home(tmp_path, monkeypatch):
    """As in a container that runs under any number."""

    def nobody(_):
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="HOME: not set, and this user has no home folder: set HOME or XDG_CACHE_HOME"):
        find_tool("llama-quantize")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "gemma4q" / "llama.cpp"
    with pytest.raises(InputError, match=f"llama-quantize: not on PATH and not in {tmp_path}/gemma4q/llama.cpp"):
        find_tool("llama-quantize")
