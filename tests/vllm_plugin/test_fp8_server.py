"""`vllm serve` on an FP8 checkpoint with no flag about quantization: a chat and a tool call, over HTTP, compiled.

Flags that concern chats are those of examples/serve_fp8_hopper.sh.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from vllm_plugin import fp8_checkpoints as fp8
from vllm_plugin.conftest import EXAMPLES

from vllm_gemma4q.evaluation.server import MODEL_NAME, serve

sys.path.insert(0, str(EXAMPLES.parent))
from small_gemma4 import chats, corpus

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SCRIPT = EXAMPLES.parent / "serve_fp8_hopper.sh"


def chat_flags() -> list[str]:
    """The example's flags about tools and thoughts, as they are written there."""
    lines = re.findall(r"^    (--\S*(?:tool|reasoning)\S*(?: \S+)?) \\$", SCRIPT.read_text(), re.MULTILINE)
    return " ".join(lines).split()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    folder, bf16 = tmp_path_factory.mktemp("fp8_server"), EXAMPLES / "dense"
    inputs = fp8.observe(bf16, corpus.training_sections()[:6])
    checkpoint = fp8.quantize(bf16, folder / "fp8", inputs, fp8.linears_outside(bf16))
    assert chat_flags() == ["--enable-auto-tool-choice", "--tool-call-parser", "gemma4", "--reasoning-parser", "gemma4"]
    with serve(checkpoint, ["--max-model-len", "512", *chat_flags()], folder / "vllm.log") as server:
        yield OpenAI(base_url=server.url, api_key="none")


def ask(client: OpenAI, messages: list[dict[str, Any]], **more: Any) -> Any:
    reply = client.chat.completions.create(
        model=MODEL_NAME,
        messages=messages,  # type: ignore[arg-type]
        max_tokens=48,
        temperature=0,
        **more,
    )
    return reply.choices[0]


def test_chat(client: OpenAI) -> None:
    choice = ask(client, [{"role": "user", "content": "What is the capital of France?"}])
    assert choice.finish_reason == "stop" and "Paris" in choice.message.content


def test_tool_call_and_its_answer(client: OpenAI) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Paris?"}]
    choice = ask(client, messages, tools=[chats.WEATHER_TOOL])
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls
    assert call.function.name == "get_weather" and json.loads(call.function.arguments) == {"city": "Paris"}
    messages += [
        {"role": "assistant", "content": "", "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "name": "get_weather", "content": "rainy"},
    ]
    answer = ask(client, messages, tools=[chats.WEATHER_TOOL])
    assert answer.message.content == "It is rainy in Paris."


def test_the_command_names_no_quantization() -> None:
    assert not re.search(r"--(?:quantization|dtype|linear-backend|moe-backend)", SCRIPT.read_text())
    assert Path(SCRIPT).stat().st_mode & 0o100
