"""Drop maps, in and out; what is refused, in one line each."""

import json

import pytest

from gguf_mixed.drop_map import RetainedExperts, read_drop_map, retained_of, summary_path, write_drop_map
from gguf_mixed.errors import InputError

NUM_EXPERTS, N_LAYERS, TOP_K = 8, 2, 4
MAP = {"0": [1, 6], "1": []}


def read(path):
    return read_drop_map(path, NUM_EXPERTS, N_LAYERS, TOP_K)


def test_what_a_map_leaves():
    found = retained_of(MAP, NUM_EXPERTS, N_LAYERS, TOP_K)
    assert found == RetainedExperts(8, ((0, 2, 3, 4, 5, 7), tuple(range(8))))
    assert (found.counts, found.is_uniform, found.dropped) == ((6, 8), False, ((1, 6), ()))
    assert found.to_json() == MAP
    assert RetainedExperts.all_of(8, 2).is_uniform
    assert RetainedExperts.all_of(8, 2).dropped == ((), ())


def test_order_does_not_matter():
    assert retained_of({"1": [], "0": [6, 1]}, 8, 2, 4) == retained_of(MAP, 8, 2, 4)


def test_round_trip_with_the_summary_beside(tmp_path):
    path, found = tmp_path / "drop.json", retained_of(MAP, NUM_EXPERTS, N_LAYERS, TOP_K)
    write_drop_map(path, found, {"recipe": "v3", "overlap": {"v4": 0.5}})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["drop.json", "drop.summary.json"]
    assert read(path) == found
    assert json.loads(path.read_text()) == MAP
    summary = {"num_experts": 8, "kept_per_layer": [6, 8], "recipe": "v3", "overlap": {"v4": 0.5}}
    assert json.loads(summary_path(path).read_text()) == summary


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"drop.summary.json: cannot be written: No such file"):
        write_drop_map(tmp_path / "absent" / "drop.json", RetainedExperts.all_of(8, 2), {})
    assert not list(tmp_path.iterdir())


REFUSED = {
    "missing layer": ('{"0": [1]}', "layer 1: missing, expected a list of dropped experts for each of 2"),
    "unknown layer": ('{"0": [], "1": [], "2": []}', "layer '2': the model has layers 0..1"),
    "layer by another name": ('{"00": [], "1": []}', "layer '00': the model has layers 0..1"),
    "too large": ('{"0": [8], "1": []}', "layer 0: got expert 8, expected 0..7"),
    "negative": ('{"0": [], "1": [-1]}', "layer 1: got expert -1, expected 0..7"),
    "bool": ('{"0": [true], "1": []}', "layer 0: got expert True, expected 0..7"),
    "float": ('{"0": [1.0], "1": []}', "layer 0: got expert 1.0, expected 0..7"),
    "text for a number": ('{"0": ["1"], "1": []}', "layer 0: got expert '1', expected 0..7"),
    "list in a list": ('{"0": [[1]], "1": []}', r"layer 0: got expert \[1\], expected 0..7"),
    "repeated": ('{"0": [3, 5, 3], "1": []}', "layer 0: expert 3 is listed twice"),
    "layer twice": ('{"0": [3], "1": [], "0": []}', "not a drop map: duplicate key '0'"),
    "whole layer": ('{"0": [0, 1, 2, 3, 4, 5, 6, 7], "1": []}', "layer 0: 0 of 8 experts left, expected at least 4"),
    "fewer than top_k": ('{"0": [], "1": [0, 1, 2, 3, 4]}', r"layer 1: 3 of 8 experts left, expected at least 4 \(top"),
    "not lists": ('{"0": 3, "1": []}', "layer 0: got 3, expected a list of dropped experts"),
    "text for a list": ('{"0": "34", "1": []}', "layer 0: got '34', expected a list of dropped experts"),
    "nothing for a list": ('{"0": null, "1": []}', "layer 0: got None, expected a list of dropped experts"),
    "not an object": ("[[1], []]", "got list, expected an object of layers"),
    "not JSON": ('{"0": [1], ', "not a drop map: .*line 1"),
    "nothing": ("", "not a drop map"),
    "nested without end": ("[" * 100_000, "not a drop map"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    content, message = REFUSED[case]
    path = tmp_path / "drop.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert "drop.json: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_as_many_as_top_k_are_enough():
    assert retained_of({"0": [4, 5, 6, 7], "1": []}, 8, 2, 4).counts == (4, 8)


def test_unreadable(tmp_path):
    with pytest.raises(InputError, match="absent.json: cannot be read"):
        read(tmp_path / "absent.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="binary.json: cannot be read"):
        read(tmp_path / "binary.json")
