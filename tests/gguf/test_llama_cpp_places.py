"""Where llama.cpp's programs are looked for."""

import os
import pwd
from pathlib import Path

import pytest
from gemma4q_kernels.ggml.quantize import _in_folders

from gguf_mixed.errors import InputError
from gguf_mixed.llama_cpp import cache_folder, find_tool, tool_help


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


@pytest.mark.parametrize("named", [".", "here"])
def test_the_folder_that_is_named_and_then_nothing_else(named, tmp_path, monkeypatch):
    """A relative one too: a program without a folder would be looked for on PATH, a library among the system's."""
    for folder in ("here", "other"):
        (tmp_path / folder).mkdir()
        tool = tmp_path / folder / "llama-quantize"
        tool.write_text(f"#!/bin/sh\necho usage of {folder}\n")
        tool.chmod(0o755)
        (tmp_path / folder / "libggml-base.so").touch()
    monkeypatch.chdir(tmp_path if named == "here" else tmp_path / "here")
    monkeypatch.setenv("PATH", str(tmp_path / "other"), prepend=os.pathsep)
    assert tool_help(find_tool("llama-quantize", Path(named))).strip() == "usage of here"
    assert _in_folders([Path(named)]) == [tmp_path / "here" / "libggml-base.so"]
