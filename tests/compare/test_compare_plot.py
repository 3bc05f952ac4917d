"""The picture: every label readable, whatever the number of points; what is a point, and what a line."""

import json
import math
import random
from itertools import combinations

import pytest
from compare_files import text_results, write_gguf
from synthetic import small_config

from vllm_gemma4q.compare.comparison import compare
from vllm_gemma4q.compare.labels import Label, place, short_names

pytest.importorskip("matplotlib")
INCHES, DOTS = (6, 3.9), 120


def labelled(labels, lines=()):
    """Axes as the picture has them; the axes, and the extents of the labels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, dpi=DOTS)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label in labels:
        axes.errorbar(label.x, label.y, [[label.y - label.low], [label.high - label.y]], fmt="o", capsize=3)
    for line in lines:
        axes.axhline(line)
    axes.set_yscale("log")
    axes.margins(x=0.15, y=0.2)
    figure.canvas.draw()
    return axes, [each.get_window_extent() for each in place(axes, labels, lines)]


def curve(count, seed=0):
    """Divergence falling with bits as it does, of neighbours that lie close."""
    draw = random.Random(seed)
    labels = []
    for index in range(count):
        x = 3 + 5 * index / count + draw.uniform(-0.1, 0.1)
        y = 4 ** (2 - x) * draw.uniform(0.8, 1.2)
        labels.append(Label(f"optimal-{x:.2f}-small", x, y, 0.95 * y, 1.05 * y))
    return labels


@pytest.mark.parametrize("count", [1, 2, 12])
@pytest.mark.parametrize("seed", range(2))
def test_labels_neither_overlap_nor_hide_points_nor_leave_the_axes(count, seed):
    labels = curve(count, seed)
    axes, boxes = labelled(labels, lines=[labels[0].y])
    assert len(boxes) == count
    assert not any(one.overlaps(two) for one, two in combinations(boxes, 2))
    assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in boxes)
    assert all(axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1 for box in boxes)
    points = [axes.transData.transform((label.x, label.y)) for label in labels]
    assert not any(box.contains(*point) for box in boxes for point in points)
    for box, point in zip(boxes, points, strict=True):  # beside its own point rather than somewhere
        nearest = [min(max(at, low), high) for at, low, high in zip(point, box.min, box.max, strict=True)]
        assert math.dist(nearest, point) < 100 / 72 * DOTS


def test_a_check_of_overlaps_sees_them():
    """Forty points in one place have no room for labels near them."""
    _, boxes = labelled([Label(f"a name of some length {index}", 4, 0.1, 0.09, 0.11) for index in range(40)])
    assert any(one.overlaps(two) for one, two in combinations(boxes, 2))


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["gemma-4-31B-int8", "gemma-4-31B-exl3-4"], ["int8", "exl3-4"]),
        (["m-Q4_0.gguf", "m-Q4_K_M.gguf"], ["0", "K_M"]),
        (["small", "small-int8"], ["small", "small-int8"]),
        (["same.gguf", "same"], ["same.gguf", "same"]),
        (["alone.gguf"], ["alone"]),
        (["a" * 40, "b"], [f"{'a' * 13}…{'a' * 13}", "b"]),
    ],
)
def test_labels_leave_out_what_all_share(names, short):
    assert short_names(names) == short


@pytest.fixture
def ggufs(tmp_path):
    text = small_config(sliding_window=64, max_position_embeddings=8192)["text_config"]
    return [write_gguf(tmp_path / f"small-{kind}.gguf", text, kind) for kind in ("F16", "Q8_0", "Q4_0")]


def pixels(path):
    import matplotlib.image

    image = matplotlib.image.imread(path)
    return image.shape[:2], len({tuple(pixel) for pixel in image[::3, ::3].reshape(-1, image.shape[2])})


def test_a_picture_of_two_groups(run, base, int8, gguf, tmp_path):
    result = text_results(tmp_path / "r.json", [int8, gguf], base, noise_floor=1e-4, windows={"raw": 4, "chat": 4})
    path = tmp_path / "picture.png"
    code, out, err = run("compare", base, int8, gguf, "--result", result, "--plot", path)
    assert (code, err) == (0, "") and out.endswith(f"Plot: {path}\n")
    (height, width), colours = pixels(path)
    assert (width, height) == (1500, round(120 * (2 * (0.7 + 2 * 3.9) + 0.7))) and colours > 20


def test_what_is_a_point_and_what_a_line(ggufs, tmp_path):
    result = text_results(tmp_path / "r.json", ggufs[1:], ggufs[0])
    found = compare(ggufs, [result], None)
    [group] = found.drawable()
    assert found.shown_in([group]) == list(found.models)
    assert found.drawable_beside(found.models[0]) == []  # the original is a line
    assert found.drawable_beside(found.models[1]) == [group]


def test_nothing_measured_is_no_picture(run, base, int8, tmp_path):
    path = tmp_path / "picture.png"
    code, out, err = run("compare", base, int8, "--plot", path)
    assert (code, out) == (2, "")
    assert err == f"error: --plot {path}: got no perplexity or divergence to draw, expected some in a --result\n"
    assert not path.exists()


def test_a_divergence_of_nothing_has_no_place_on_a_logarithmic_axis(base, int8, gguf, tmp_path):
    result = text_results(tmp_path / "r.json", [int8, gguf], base)
    document = json.loads(result.read_text())
    for path in (int8, gguf):
        document["checkpoints"][str(path)]["divergence"]["raw"]["mean_kld"] = 0.0
    result.write_text(json.dumps(document))
    found = compare([base, int8, gguf], [result], None)
    found.plot(found.drawable(), tmp_path / "p.png")
    assert pixels(tmp_path / "p.png")[0] == (round(120 * (0.7 + 3.9 + 0.7)), 1500)  # perplexity alone
