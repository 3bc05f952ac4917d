"""The small models' tokenizer and chat template."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    "text",
    [
        "plain words",
        "two  spaces\n\nand\ttabs\n",
        "smile \U0001f600, na\u00efve \u4f60\u597d",
        "x = {1: 'a'}  # 9%",
        "",
    ],
    ids=["words", "blanks", "unicode", "code", "empty"],
)
def test_tokenizer_round_trips(tokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == 2 and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_have_gemmas_names_and_first_ids(tokenizer) -> None:
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<bos>", "<unk>"]) == [0, 1, 2, 3]
    names = ["<|turn>", "<turn|>", "<|image>", "<|image|>", "<image|>", "<|tool_call>", "<tool_call|>", "<|channel>"]
    ids = tokenizer.convert_tokens_to_ids(names)
    assert len(set(ids)) == len(names) and tokenizer.unk_token_id not in ids
    assert [tokenizer(name, add_special_tokens=False).input_ids for name in names] == [[index] for index in ids]


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is it?"}]},
    {"role": "assistant", "content": "In Rome."},
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "function": {"name": "look", "arguments": {"at": "Rome", "n": 2}}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    {"role": "assistant", "content": "Sunny."},
    {"role": "user", "content": "Bye"},
]
LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
    },
}
RENDERED = (
    '<bos><|turn>system\nBe brief.<|tool>declaration:look{description:<|"|>Looks.<|"|>,parameters:{'
    'type:<|"|>OBJECT<|"|>,properties:{at:{type:<|"|>STRING<|"|>}},required:[<|"|>at<|"|>]}}<tool|><turn|>\n'
    "<|turn>user\n<|image|>Where is it?<turn|>\n<|turn>model\nIn Rome.<turn|>\n<|turn>user\nWeather?<turn|>\n"
    '<|turn>model\n<|tool_call>call:look{at:<|"|>Rome<|"|>,n:2}<tool_call|>'
    '<|tool_response>response:look{value:<|"|>sunny<|"|>}<tool_response|>Sunny.<turn|>\n'
    "<|turn>user\nBye<turn|>\n<|turn>model\n"
)


def test_chat_template_renders_gemma_4_turns(tokenizer) -> None:
    rendered = tokenizer.apply_chat_template(CONVERSATION, tools=[LOOK], tokenize=False, add_generation_prompt=True)
    assert rendered == RENDERED
