"""Build the small checkpoints: `python examples/small_gemma4/build.py [dense|moe|all] [--output DIR] [--steps N]`.

Writes DIR/dense and DIR/moe (default: beside this file), each a complete checkpoint folder plus training.json with
losses, accuracies, steps and seconds. Needs torch and transformers, no network and no GPU. The same versions and number
of threads on the same kind of processor give the same bytes (except for the seconds).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

from small_gemma4 import chats, corpus, evaluate, model, tokenizer, train

STEPS = {"dense": 900, "moe": 900}
TOKENIZER_CHATS = 4000


def build_tokenizer() -> transformers.GemmaTokenizer:
    """The tokenizer of both models, trained on the training text and on generated chats."""
    spoken = itertools.islice(chats.generate(0, held_out=False), TOKENIZER_CHATS)
    lines = [message["content"] for chat in spoken for message in chat.messages]
    return tokenizer.build([*corpus.training_sections(), *lines])


def build(kind: str, folder: Path, recipe: train.Recipe, evaluated: bool = True) -> dict[str, Any]:
    """Train one model, write its checkpoint and training.json, and return the latter; evaluation takes minutes."""
    folder.mkdir(parents=True, exist_ok=True)
    processor = model.build_processor(build_tokenizer())
    network = model.build_model(model.build_config(kind, processor.tokenizer), seed=0)
    started = time.perf_counter()
    train.train(network, processor, recipe)
    seconds = time.perf_counter() - started
    model.save(network, processor, kind, folder)
    result: dict[str, Any] = {
        "steps": recipe.steps,
        "threads": recipe.threads,
        "seconds": round(seconds, 1),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if evaluated:
        result |= evaluate.report(model.load(folder), processor)
    (folder / "training.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small Gemma 4 checkpoints.")
    parser.add_argument("kind", nargs="?", default="all", choices=["dense", "moe", "all"])
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent, help="where dense/, moe/ go")
    parser.add_argument("--steps", type=int, help="training steps (default: dense {dense}, moe {moe})".format(**STEPS))
    parser.add_argument("--threads", type=int, default=train.THREADS, help="processor threads (default: %(default)s)")
    parser.add_argument("--no-evaluation", action="store_true", help="leave losses and accuracies out of training.json")
    arguments = parser.parse_args()
    kinds = ["dense", "moe"] if arguments.kind == "all" else [arguments.kind]
    for kind in kinds:
        recipe = train.Recipe(arguments.steps or STEPS[kind], threads=arguments.threads)
        result = build(kind, arguments.output / kind, recipe, not arguments.no_evaluation)
        if arguments.no_evaluation:
            continue
        held, accuracy = result["held_out_loss"], result["chat_accuracy"]["all"]
        print(f"{kind}: text {held['text']:.3f}, chat {held['chat']:.3f} nats/token, {accuracy:.0%} right answers")


if __name__ == "__main__":
    main()
