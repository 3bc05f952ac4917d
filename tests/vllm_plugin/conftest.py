"""Checkpoints and engines that the tests of this folder share; engines run once a session."""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from vllm_plugin import checkpoints
from vllm_plugin.engine import Answers, Request, ask, ask_all

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "small_gemma4"
MODELS = EXAMPLES
PROMPT_TOKENS = 160
DENSE_FULL_LAYER = f"{checkpoints.ROOT}2."  # full attention: no v_proj

# Half a module's rows: a factor on all rows of any linear but gate_proj vanishes in the norm that follows it.
CORRUPTED = (r"\.1\.self_attn\.o_proj\.weight_scale$", 1.5)
CORRUPTED_EXPERTS = (r"\.experts\.\d+\.down_proj\.weight_scale$", 1.5)
# In words that only this plugin understands, beside exact names of things that are int8 in the file.
ODD_EXCLUDES = ["*vision_tower*", "re:.*router.*", "language_model.model.layers.0.self_attn.qkv_proj", "lm_head"]


@dataclass(frozen=True)
class Family:
    """One small model and its variants by name; `text_only` has no vision tower."""

    bf16: Path
    variants: dict[str, Path]


@dataclass(frozen=True)
class Questions:
    """What every engine is asked: text to score, chats to answer, pictures to describe."""

    text: list[list[int]]
    chats: list[list[int]]
    pictures: list[tuple[object, str]]

    @property
    def prompts(self) -> list[list[int]]:
        return self.text + self.chats


@pytest.fixture(scope="session")
def small_models() -> Path:
    """Folder of the small trained checkpoints, `dense` and `moe`."""
    return MODELS


@pytest.fixture(scope="session")
def dense(small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    bf16, folder = small_models / "dense", tmp_path_factory.mktemp("dense")
    int8, original = checkpoints.quantize(bf16, folder / "int8"), checkpoints.load(bf16)
    attention = f"{DENSE_FULL_LAYER}self_attn."
    variants = {
        "int8": int8,
        "corrupted": _edited(folder, "corrupted", int8, lambda t: checkpoints.multiply_half(t, *CORRUPTED)),
        "bf16_attention": _edited(
            folder, "bf16_attention", int8, lambda t: checkpoints.unquantize(t, original, attention)
        ),
        "odd_excludes": checkpoints.edit(int8, folder / "odd_excludes", exclude=ODD_EXCLUDES),
        "no_excludes": checkpoints.edit(int8, folder / "no_excludes", exclude=[]),
        "text_only": checkpoints.text_only(int8, folder / "text_only"),
    }
    return Family(bf16, variants)


@pytest.fixture(scope="session")
def moe(small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    bf16, folder = small_models / "moe", tmp_path_factory.mktemp("moe")
    int8, original = checkpoints.quantize(bf16, folder / "int8"), checkpoints.load(bf16)

    def slips(tensors: checkpoints.Tensors) -> checkpoints.Tensors:
        for layer in {name.split("experts.")[0] for name in original if ".experts." in name}:
            tensors = checkpoints.unquantize(tensors, original, f"{layer}experts.")
        return checkpoints.round_norms(tensors)

    variants = {
        "int8": int8,
        "corrupted": _edited(folder, "corrupted", int8, lambda t: checkpoints.multiply_half(t, *CORRUPTED)),
        "corrupted_experts": _edited(
            folder, "corrupted_experts", int8, lambda t: checkpoints.multiply_half(t, *CORRUPTED_EXPERTS)
        ),
        "fused": _edited(folder, "fused", int8, checkpoints.fuse_experts),
        "slips": _edited(folder, "slips", int8, slips),
    }
    return Family(bf16, variants)


def _edited(
    folder: Path, name: str, source: Path, change: Callable[[checkpoints.Tensors], checkpoints.Tensors]
) -> Path:
    return checkpoints.edit(source, folder / name, change)


@pytest.fixture(scope="session")
def questions(small_models: Path) -> Questions:
    """Held-out text and pictures."""
    from transformers import AutoTokenizer

    held_out = _held_out()
    tokenizer = AutoTokenizer.from_pretrained(small_models / "dense")
    conversations = held_out.conversations(64)
    text = [tokenizer(text).input_ids[:PROMPT_TOKENS] for text in held_out.natural_text()[:4]]
    # One learned word each: a longer answer, or arithmetic, ends in near-ties that any other rounding flips.
    is_fact = [not re.search(r"\d", chat[-2]["content"]) and " " not in chat[-1]["content"] for chat in conversations]
    facts = [chat for chat, fact in zip(conversations, is_fact, strict=True) if fact]
    chats = [
        tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False) for chat in facts[:8]
    ]
    pictures = [(picture.image, picture.question) for picture in held_out.questions_about_pictures(4)]
    return Questions(text, chats, pictures)


def _held_out() -> ModuleType:
    spec = importlib.util.spec_from_file_location("held_out", EXAMPLES / "held_out.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def dense_answers(dense: Family, questions: Questions) -> dict[str, Answers]:
    """Answers by variant, "bf16" included, from one process."""
    return _ask_family(dense, questions)


@pytest.fixture(scope="session")
def moe_answers(moe: Family, questions: Questions) -> dict[str, Answers]:
    """Answers by variant, "bf16" included, from one process."""
    return _ask_family(moe, questions)


def _ask_family(family: Family, questions: Questions) -> dict[str, Answers]:
    folders = {"bf16": family.bf16, **family.variants}
    requests = [
        Request(folder, questions.prompts, engine={"limit_mm_per_prompt": None})
        if variant == "text_only"
        else Request(folder, questions.prompts, questions.pictures)
        for variant, folder in folders.items()
    ]
    return dict(zip(folders, ask_all(requests), strict=True))


@pytest.fixture(scope="session")
def ask_with(questions: Questions) -> Callable[..., Answers]:
    """Ask a checkpoint in vLLM's usual processes, with engine arguments."""
    return lambda folder, **engine: ask(Request(folder, questions.prompts, engine=engine))
