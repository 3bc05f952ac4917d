"""The picture of a card: beside models of the same base, where result files have figures of both; else none."""

import json

import pytest
from compare_files import CACHE, text_results
from synthetic import small_config, write_checkpoint

pytest.importorskip("matplotlib")


def test_a_picture_beside_others(run, base, int8, gguf, tmp_path):
    result = text_results(tmp_path / "kld.json", [int8, gguf], base)
    card = tmp_path / "README.md"
    given = ["card", int8, "--beside", base, "--beside", gguf, "--result", result, "-o", card]
    code, out, err = run(*given, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"card": str(card), "picture": str(tmp_path / "README.png"), "results": 1}
    text = card.read_text()
    assert "Beside small, small-Q8_0.gguf, on the same text:\n\n![Divergence and perplexity" in text
    assert "](README.png)" in text and str(tmp_path) not in text
    picture = (tmp_path / "README.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    (tmp_path / "README.png").write_bytes(b"mine")
    card.unlink()
    code, _, err = run(*given)
    assert code == 2 and "README.png: exists and is another; remove it" in err
    assert not card.exists() and (tmp_path / "README.png").read_bytes() == b"mine"


@pytest.mark.parametrize("which", ["original", "another protocol", "nothing"])
def test_no_picture_without_two_that_were_measured_alike(run, base, int8, gguf, tmp_path, which):
    results = {
        "original": [text_results(tmp_path / "one.json", [int8], base)],
        "another protocol": [
            text_results(tmp_path / "two.json", [int8], base),
            text_results(tmp_path / "three.json", [gguf], base, context=256),
        ],
        "nothing": [],
    }[which]
    card = tmp_path / "README.md"
    given = [part for path in results for part in ("--result", path)]
    code, out, err = run("card", int8, "--beside", base, "--beside", gguf, *given, "-o", card)
    assert (code, out) == (0, f"Wrote {card}.\n")
    assert err.startswith("note: no picture: no --result has figures of two of these models")
    assert "README.png" not in card.read_text() and not (tmp_path / "README.png").exists()


def test_results_of_a_model_beside_are_not_the_cards(run, base, int8, gguf, tmp_path):
    result = text_results(tmp_path / "kld.json", [gguf], base)
    code, out, _ = run("card", int8, "--beside", gguf, "--result", result, "-o", "-")
    assert code == 0 and "Quality" not in out
    assert run("card", int8, "--result", result, "-o", "-")[2].startswith(f"error: {result}: figures of small (")


def test_another_engine_is_named_and_tried_no_serving(run, base, int8, tmp_path):
    result = text_results(tmp_path / "kld.json", [int8], base, engine={"name": "transformers", "version": "5.19.0"})
    out = run("card", int8, "--result", result, "-o", "-")[1]
    assert "windows of 512 tokens, transformers 5.19.0, dtype auto" in out and "vllm serve" not in out


def test_another_base_beside_is_refused(run, int8, tmp_path):
    other = write_checkpoint(tmp_path / "other", small_config(**CACHE, hidden_size=128))
    code, _, err = run("card", int8, "--beside", other, "-o", "-")
    assert code == 2 and err.endswith(": not one base\n")
