"""`vllm serve` on an INT8 checkpoint with the plugin installed and no flag about quantization: chats over HTTP."""

import base64
import io
import json
import sys
from pathlib import Path

import pytest
from openai import OpenAI
from safetensors.torch import load_file, save_file

from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.server import MODEL_NAME, serve
from vllm_gemma4q.quark_int8 import quantize

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from small_gemma4 import held_out  # noqa: E402

pytestmark = pytest.mark.engine

# What any start needs on a small machine; nothing here concerns quantization.
FLAGS = ("--enforce-eager", "--max-model-len", "512")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    convert(
        quantize.plan(open_checkpoint(EXAMPLES / "small_gemma4" / "moe")), folder / "int8", ["test"], lambda _: None
    )
    return folder / "int8"


@pytest.fixture(scope="module")
def client(checkpoint):
    with serve(checkpoint, FLAGS, checkpoint.parent / "vllm.log") as server:
        yield OpenAI(base_url=server.url, api_key="none")


def answer(client, content):
    messages = [{"role": "user", "content": content}]
    reply = client.chat.completions.create(model=MODEL_NAME, messages=messages, max_tokens=16, temperature=0)
    assert reply.choices[0].finish_reason == "stop"
    return reply.choices[0].message.content


@pytest.mark.parametrize(("question", "expected"), [("What is the capital of France?", "Paris")])
def test_chat(client, question, expected):
    assert expected in answer(client, question)


def test_pictures_through_the_untouched_vision_tower(client):
    pictures = [picture for picture in held_out.questions_about_pictures(16) if "the picture?" in picture.question]
    assert len({picture.answer for picture in pictures}) >= 3
    for picture in pictures:
        buffer = io.BytesIO()
        picture.image.save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": picture.question}]
        assert answer(client, content) == picture.answer


def test_missing_scale_ends_the_server_with_its_name(checkpoint, tmp_path):
    """Stock vLLM would start and answer garbage."""
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in checkpoint.iterdir():
        (damaged / path.name).symlink_to(path)
    tensors = load_file(checkpoint / "model.safetensors")
    name = next(name for name in tensors if name.endswith("experts.3.up_proj.weight_scale"))
    del tensors[name]
    (damaged / "model.safetensors").unlink()
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=name), serve(damaged, FLAGS, tmp_path / "vllm.log"):
        pass


def test_log_is_named_when_the_server_dies(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with (
        pytest.raises(InputError, match=r"vllm serve: exited with code .*vllm\.log"),
        serve(tmp_path, FLAGS, tmp_path / "vllm.log"),
    ):
        pass
