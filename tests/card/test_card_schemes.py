"""Cards of what every command writes: pruned checkpoints, their quantized ones, restored ones."""

import json
import shutil
from pathlib import Path

import in_process
import pytest
import yaml
from safetensors import safe_open

from vllm_gemma4q.card.experts import Experts, Stored, stored_in
from vllm_gemma4q.errors import InputError

SMALL = Path(__file__).resolve().parents[2] / "examples" / "small_gemma4"
MANIFEST, METADATA = "gemma4q-manifest.json", "expert_drop_metadata.json"


def run(*arguments: object) -> str:
    code, out, error = in_process.gemma4q(*arguments)
    assert code == 0, error
    return out


def card(checkpoint: Path) -> str:
    return run("card", checkpoint, "-o", "-")


def parameters(checkpoint: Path) -> int:
    """Of all tensors, by the safetensors library."""
    total = 0
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            slices = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        for shape in slices:
            size = 1
            for length in shape:
                size *= length
            total += size
    return total


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`pruned`, `pruned-int8`, and `int8-pruned`, the same two steps the other way round."""
    found = tmp_path_factory.mktemp("schemes")
    drop = found / "drop.json"
    drop.write_text(json.dumps({"0": [1], "1": [2, 3], "2": []}))
    knobs = ["--shared-boost", 1.5, "--soft-transfer", 0.25, "--top-k", 3]
    run("prune", SMALL / "moe", found / "pruned", "--keep", 12, "--recipe", "magnitude")
    run("quantize", found / "pruned", found / "pruned-int8", "--scheme", "quark-int8")
    run("quantize", SMALL / "moe", found / "int8", "--scheme", "quark-int8")
    run("prune", found / "int8", found / "int8-pruned", "--drop-map", drop)
    run("prune", SMALL / "moe", found / "by-map", "--drop-map", drop, *knobs)
    return found


def test_a_pruned_checkpoint(folder):
    text = card(folder / "pruned")
    assert "3 layers keep 12 of 16 experts. Chosen by the recipe `magnitude`." in text
    before, after = parameters(SMALL / "moe"), parameters(folder / "pruned")
    assert before > after
    assert "| part | parameters before | parameters now | GB before | GB now |" in text
    assert f"| total | {before:,} | {after:,} |" in text
    assert "quantized" not in text
    assert yaml.safe_load(text.split("---\n")[1])["tags"][-1] == "prune"
    known = run("card", folder / "pruned", "-o", "-", "--base-model", "google/gemma-4-26B-A4B-it")
    assert "base_model_relation: finetune" in known


def test_a_drop_map_and_what_else_was_changed(folder):
    text = card(folder / "by-map")
    assert "3 layers keep 14 to 16, 15.0 on average, of 16 experts. Chosen by the drop map `drop.json`." in text
    assert "The dense MLP's share is multiplied by 1.5." in text
    assert "0.25 of dropped router rows were added to their nearest. Experts a token: 3." in text


def test_statistics_and_a_refit(folder, tmp_path):
    """As the manifest has them where both were used."""
    target = tmp_path / "refitted"
    shutil.copytree(folder / "pruned", target)
    path = target / MANIFEST
    path.chmod(0o644)
    manifest = json.loads(path.read_text())
    used = {"texts": [{"name": "one.txt"}, {"name": "two.txt"}], "samples": 1024}
    manifest["details"] |= {"recipe": "reap", "spread": True, "statistics": used, "refit": {**used, "samples": 64}}
    path.write_text(json.dumps(manifest))
    text = card(target)
    how = "Chosen by the recipe `reap` on statistics of one.txt, two.txt (1,024 samples)"
    assert f"{how}, more in layers where dropping costs more." in text
    assert "`down_proj` of the experts that stay was refitted on one.txt, two.txt (64 samples)." in text
    del manifest["details"]["experts"]["after"]
    path.write_text(json.dumps(manifest))
    code, _, error = in_process.gemma4q("card", target, "-o", "-")
    assert code == 2 and error == f"error: {MANIFEST}: damaged: KeyError: 'after'\n"


def test_a_pruned_checkpoint_that_was_quantized(folder):
    """Its manifest knows the last command only; what was pruned lies beside the weights."""
    assert stored_in(folder / "pruned-int8") == Stored(Experts(16, (12, 12, 12)), "quark-int8")
    text = card(folder / "pruned-int8")
    assert "W8A8 INT8" in text and "A mixture with fewer experts" in text
    assert "3 layers keep 12 of 16 experts." in text and "| part | parameters | quantized |" in text
    assert yaml.safe_load(text.split("---\n")[1])["tags"][-2:] == ["quark-int8", "prune"]
    assert "| part | parameters | quantized |" in card(folder / "pruned-int8")


def test_a_quantized_checkpoint_that_was_pruned(folder):
    assert stored_in(folder / "int8-pruned") == Stored(Experts(16, (15, 14, 16)), "quark-int8")
    text = card(folder / "int8-pruned")
    assert (
        "W8A8 INT8" in text and "of 16 experts. Chosen by the drop map" in text and "Parameters count scales." in text
    )
    assert f"| total | {parameters(folder / 'int8'):,} | {parameters(folder / 'int8-pruned'):,} |" in text
    assert "3 layers keep" in card(folder / "int8-pruned")


def test_metadata_of_another_model_say_nothing(folder, tmp_path):
    """A checkpoint that was pruned by other tools may have a file of that name."""
    assert stored_in(SMALL / "moe") == Stored() and stored_in(SMALL / "dense") == Stored()
    target = tmp_path / "other"
    shutil.copytree(folder / "pruned", target)
    (target / METADATA).chmod(0o644)
    for content in ({"num_experts": 16, "per_layer_keep": {"0": [1]}}, {"num_experts": "16"}, [], None):
        (target / METADATA).write_text(json.dumps(content))
        assert stored_in(target).experts is None
    (target / "config.json").unlink()
    with pytest.raises(InputError):
        stored_in(target)


@pytest.mark.parametrize("scheme", ["exl3", "restore", "fp8-static"])
def test_other_schemes(scheme, folder, tmp_path):
    """A card and a report each."""
    target = tmp_path / scheme
    if scheme == "exl3":
        run("quantize", SMALL / "dense", target, "--scheme", "exl3", "--bits", 2, "--no-hessian")
    elif scheme == "restore":
        from restore.damage import load, store, to_int8

        damaged = tmp_path / "damaged"
        shutil.copytree(folder / "pruned-int8", damaged)
        for path in damaged.iterdir():
            path.chmod(0o644)
        tensors, name = load(damaged), "model.embed_vision.embedding_projection.weight"
        tensors[name], tensors[f"{name}_scale"] = to_int8(tensors[name])
        store(damaged, tensors)
        run("restore", damaged, folder / "pruned", target)
    else:
        from examples.small_gemma4 import corpus

        text, statistics = tmp_path / "text.txt", tmp_path / "statistics.safetensors"
        text.write_text("\n\n".join(corpus.training_sections()))
        run("calibrate", folder / "pruned", statistics, "--text", text, "--samples", 2, "--max-length", 64)
        run("quantize", folder / "pruned", target, "--scheme", "fp8-static", "--statistics", statistics)
    assert f"- {scheme}\n" in card(target) and "| total | " in card(target)
    page = tmp_path / "page.html"
    run("report", target, "-o", page)
    assert "What the manifest says of the original".lower() in page.read_text().lower()


def test_reports_of_pruned_checkpoints(folder, tmp_path):
    for name in ("pruned", "pruned-int8", "int8-pruned"):
        found = json.loads(run("report", folder / name, "-o", tmp_path / f"{name}.html", "--json"))
        assert found["roles"]["experts"]["bytes_after"] < found["roles"]["experts"]["bytes_before"]
