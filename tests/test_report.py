"""HTML pages, charts, the progress bar and the environment: right values for any input, self-contained files."""

import base64
import dataclasses
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import kvision
from kvision import files
from kvision.report import (
    MisclassifiedExample,
    Progress,
    bar_chart,
    comparison_table,
    environment,
    hardware,
    line_chart,
    matrix_chart,
    page,
    peak_memory_bytes,
    progress,
    seconds_since_process_start,
    versions,
    write_compare_report,
    write_report,
)
from kvision.report.svg import nice_ticks

HOSTILE = "\"'><script>alert(1)</script>&amp;\x00\x1b[31m\udcff"
BACKENDS = ("jax", "tensorflow", "torch")


class Page(HTMLParser):
    """Reads a page strictly: every element closed in order, text and attributes collected."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        assert len({name for name, _ in attributes}) == len(attributes), f"an attribute twice in {tag}"
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    def all(self, tag: str, **wanted: str) -> list[dict]:
        return [found for name, found in self.elements if name == tag and wanted.items() <= found.items()]


def make_run(k: int = 3, names=None, epochs: int = 4) -> dict:
    random = np.random.default_rng(0)
    confusion = random.integers(0, 40, (k, k)) + 700 * np.eye(k, dtype=int)
    history = [
        {
            "epoch": epoch,
            "loss": 2.0 / epoch,
            "accuracy": 0.5 + 0.1 * epoch / epochs,
            "test_loss": 2.1 / epoch,
            "test_accuracy": 0.45 + 0.1 * epoch / epochs,
            "learning_rate": 0.05 / epoch,
            "seconds": 10.0 + epoch,
            "images_per_second": 1700.0 + epoch,
        }
        for epoch in range(1, epochs + 1)
    ]
    result = {
        "dataset": "CIFAR-10",
        "model": "resnet20",
        "backend": "jax",
        "test_accuracy": 0.91525,
        "test_loss": 0.31234,
        "train_seconds": 591.0,
        "images_per_second": 1733.4,
        "seconds_to_first_step": 9.31,
        "compile_seconds": 4.27,
        "peak_memory_bytes": 3 * 2**29,
        "parameters": 269722,
        "seed": 7,
        "weights_sha256": "ab" * 32,
        "versions": {"python": "3.11.7", "keras": "3.15.1"},
        "hardware": {"cpu": "A Fine Processor", "cores": 2, "memory_bytes": 8 * 2**30},
        "command": "python -m apps.cifar10 --model resnet20",
        "note": "shapes10 in place of CIFAR-10",
    }
    image = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    names = names or [f"kind {index}" for index in range(k)]
    mistakes = [
        MisclassifiedExample(image, names[0], names[-1], 0.9876),
        MisclassifiedExample(image[..., :1], names[-1], names[0], 0.5),
    ]
    config = {"model": "resnet20", "epochs": epochs, "augment": True, "data": None, "learning_rate": 0.05}
    return {
        "config": config,
        "history": history,
        "result": result,
        "confusion": confusion,
        "classes": names,
        "mistakes": mistakes,
    }


def make_comparison() -> dict:
    rows = [
        {
            "backend": backend,
            "status": "ok",
            "reason": None,
            "test_accuracy": 0.91 + index / 1000,
            "test_loss": 0.3,
            "final_loss": 0.2512 + index / 1000,
            "max_loss_difference": 0.21 if index else None,
            "first_loss_difference": 2.5e-7 if index else None,
            "initial_logits_difference": 1.5e-6 if index else None,
            "images_per_second": 1500.0 + 100 * index,
            "seconds_to_first_step": 9.5 + index,
            "compile_seconds": None if backend == "torch" else 4.5,
            "peak_memory_bytes": (index + 1) * 2**30,
            "train_seconds": 600.0 + index,
            "weights_sha256": f"{index}" * 64,
            "versions": {"keras": "3.15.1", backend: f"{index}.1"},
            "history": [{"epoch": epoch, "loss": 2 / epoch, "test_accuracy": 0.5} for epoch in (1, 2, 3)],
            "step_losses": [2.3 + index * 1e-7, 2.2 + index * 1e-6, 2.1],
        }
        for index, backend in enumerate(BACKENDS)
    ]
    return {
        "command": "python -m apps.compare cifar10 --check",
        "app": "cifar10",
        "arguments": ["--model", "resnet20"],
        "hardware": {"cpu": "A Fine Processor", "memory_bytes": 2**33},
        "checks": [
            {"name": "logits", "value": 1.5e-6, "limit": 1e-5, "passed": True},
            {"name": "accuracy", "value": 0.2, "limit": 1.5, "passed": True},
        ],
        "rows": rows,
    }


def check_alone(text: str) -> Page:
    """A page that is well formed and asks nothing of the world."""
    found = Page(text)
    assert not re.search(r"https?:|://|@import|url\(|<script|<link|<iframe|<[^>]* on\w+=", text)
    assert all(image["src"].startswith("data:image/png;base64,") for image in found.all("img"))
    return found


# --- The page of a run ---


def test_report_of_many_classes_has_no_matrix_but_its_classes(tmp_path):
    """A matrix of 49,999 classes would take 18.6 GiB, and nobody could look at it."""
    k = 49_999
    counts = {(0, 0): 3, (0, 17): 2, (0, 5): 1, (k - 1, k - 1): 4}
    run = make_run(3) | {"confusion": counts, "classes": [f"kind {i}" for i in range(k)], "mistakes": []}
    text = write_report(tmp_path, **run).read_text(encoding="utf-8")
    found = check_alone(text)
    assert "Confusion matrix" not in text and len(text) < 200_000
    words = " ".join(" ".join(found.texts).split())
    assert "7 of 10 images" in words and "The 20 worst of 49999 classes" in words
    assert re.search(r"kind 0 3 6 50\.00 % kind 17 \(2\)", words)


@pytest.mark.parametrize("k", [2, 31])
def test_a_matrix_is_the_same_from_what_occurred_of_it(tmp_path, k):
    run = make_run(k)
    pairs = {(i, j): int(run["confusion"][i, j]) for i, j in np.argwhere(run["confusion"])}
    dense, sparse = (
        write_report(tmp_path / name, **run | {"confusion": counts}).read_text(encoding="utf-8")
        for name, counts in (("dense", run["confusion"]), ("sparse", pairs))
    )
    assert dense == sparse


@pytest.mark.parametrize("counts", [{(0, 3): 1}, {(-1, 0): 1}, {(0, 1): -1}, {(0, 1): 0.5}])
def test_counts_of_no_class_are_refused(tmp_path, counts):
    with pytest.raises(ValueError, match="confusion matrix"):
        write_report(tmp_path, **make_run(3) | {"confusion": counts})


def test_report_draws_the_learning_rate_of_each_step(tmp_path):
    run = make_run(epochs=2)
    steps = [i / 10 for i in range(20)]
    rates = [0.01 + 0.09 * min(step, 1) for step in steps]
    found = Page(write_report(tmp_path, **run, learning_rates=(steps, rates)).read_text(encoding="utf-8"))
    titles = [text for text in found.texts if text.startswith("learning rate: ")]
    assert len(titles) == 1 + 20 and titles[0] == "learning rate: first 0.01000, last 0.1000"
    assert "learning rate: 0.0550000 at epoch 0.5000" in titles


@pytest.mark.parametrize("k", [1, 2, 10, 31, 100])
def test_report_is_well_formed_and_self_contained(tmp_path, k):
    path = write_report(tmp_path / "new" / "run", **make_run(k))
    assert path == tmp_path / "new" / "run" / "report.html"
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    text = path.read_text(encoding="utf-8")
    check_alone(text)
    assert len(text) < 400_000


def test_report_numbers_equal_the_inputs(tmp_path):
    run = make_run()
    found = Page(write_report(tmp_path, **run).read_text(encoding="utf-8"))
    total, right = run["confusion"].sum(), np.trace(run["confusion"])
    error = 100 * math.sqrt(0.91525 * (1 - 0.91525) / total)
    for expected in (
        "resnet20 on CIFAR-10, jax: 91.53 %",
        "91.53 % test accuracy of resnet20 on CIFAR-10 with the jax backend",
        f"{right:,} of {total:,} images, standard error {error:.2f} points",
        "shapes10 in place of CIFAR-10",
        "0.3123",
        "269,722",
        "9 min 51 s",
        "1,733 images/s",
        "12.5 s (median of 4)",
        "Process start to first step 9.31 s",
        "Compilation 4.27 s",
        "Peak memory of the process 1.5 GiB",
        "seed 7",
        "ab" * 32,
        "keras 3.15.1",
        "cpu A Fine Processor",
        "memory 8 GiB",
        "python -m apps.cifar10 --model resnet20",
        "epochs 4",
        "augment true",
        "learning_rate 0.05",
        "confidence 98.76 %",
        # The table of epochs: epoch 4's row in full.
        "4 0.5000 60.00 % 0.5250 55.00 % 0.01250 14.00 1,704",
    ):
        assert expected in found.text, expected
    for index, name in enumerate(run["classes"]):
        counts = run["confusion"][index]
        others = np.where(np.arange(3) == index, -1, counts)
        worst = run["classes"][others.argmax()]
        share = f"{100 * counts[index] / counts.sum():.2f} %"
        assert f"{name} {counts[index]} {counts.sum()} {share} {worst} ({others.max()})" in found.text


def test_report_examples_are_the_images(tmp_path):
    run = make_run()
    found = Page(write_report(tmp_path, **run).read_text(encoding="utf-8"))
    assert [image["alt"] for image in found.all("img")] == [
        "kind 0 predicted as kind 2",
        "kind 2 predicted as kind 0",
    ]
    for image, mistake in zip(found.all("img"), run["mistakes"], strict=True):
        data = base64.b64decode(image["src"].partition(",")[2])
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(pixels.reshape(mistake.image.shape), mistake.image)


def test_report_of_almost_nothing(tmp_path):
    path = write_report(tmp_path, config={}, history=[], result={}, confusion=[[0]], classes=["a"], mistakes=[])
    found = check_alone(path.read_text(encoding="utf-8"))
    assert "nan" not in found.text and "None" not in found.text


def test_report_of_a_diverged_run_says_so(tmp_path):
    run = make_run()
    for row in run["history"][1:]:
        row.update(loss=float("nan"), test_loss=float("inf"), accuracy=None, learning_rate=None)
        del row["seconds"]
    run["result"].update(test_loss=float("nan"), images_per_second=None)
    text = write_report(tmp_path, **run).read_text(encoding="utf-8")
    found = check_alone(text)
    assert "Test loss nan" in found.text
    assert not re.search(r'(?:d|x|y|cx|cy|width)="[^"]*(?:nan|inf)', text)


def test_hostile_names_stay_text(tmp_path):
    run = make_run(3, names=[HOSTILE, "plain", "<b>"])
    run["result"].update(dict.fromkeys(("dataset", "model", "note", "command", "own"), HOSTILE))
    run["result"]["versions"] = {HOSTILE: HOSTILE}
    run["config"] = {HOSTILE: {HOSTILE: [HOSTILE]}}
    text = write_report(tmp_path, **run).read_text(encoding="utf-8")
    found = check_alone(text)
    assert not found.all("b", **{"class": "none"}) and not found.all("script")
    assert "\x00" not in text and "\x1b" not in text
    assert "<script>alert(1)</script>&amp;" in found.text

    comparison = make_comparison()
    comparison["app"] = comparison["rows"][0]["backend"] = HOSTILE
    comparison["checks"][0]["name"] = HOSTILE
    comparison["rows"][1].update(status="failed", reason=HOSTILE)
    found = check_alone(write_compare_report(tmp_path, comparison).read_text(encoding="utf-8"))
    assert not found.all("script")


def test_report_is_written_atomically(tmp_path, monkeypatch):
    path = write_report(tmp_path, **make_run())
    before = path.read_bytes()
    bad = make_run()
    bad["confusion"] = np.zeros((2, 2))
    with pytest.raises(ValueError, match=r"of shape \(3, 3\), got \(2, 2\)"):
        write_report(tmp_path, **bad)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, **make_run(2))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    "shape, dtype",
    [((4, 4), np.uint8), ((4, 4, 3), np.float32), ((4, 4, 2), np.uint8), ((0, 4, 3), np.uint8)],
)
def test_misclassified_example_requires_an_image(shape, dtype):
    with pytest.raises(ValueError, match="uint8"):
        MisclassifiedExample(np.zeros(shape, dtype), "a", "b", 0.5)


def test_misclassified_example_is_frozen():
    mistake = MisclassifiedExample(np.zeros((2, 2, 1), np.uint8), "a", "b", 0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        mistake.true = "c"


# --- The page and the table of a comparison ---


def test_compare_report_numbers_equal_the_inputs(tmp_path):
    path = write_compare_report(tmp_path, make_comparison())
    assert path == tmp_path / "compare.html"
    found = check_alone(path.read_text(encoding="utf-8"))
    for expected in (
        "cifar10 on jax, tensorflow, torch",
        "3 of 3 backends ran. All 2 checks passed.",
        "tensorflow 91.10 % 0.2522 1.5e-06 2.5e-07 2.1e-01 1,600 10.5 s 4.5 s 2 GiB 601.0 s",
        "logits 1.5e-06 1e-05 passed",
        "accuracy 0.2 1.5 passed",
        "1,600 images/s",
        "2,048 MiB",
        "not measured",
        "keras 3.15.1 3.15.1 3.15.1",
        "2" * 16,
        "cpu A Fine Processor",
        "memory 8 GiB",
        "--model resnet20",
    ):
        assert expected in found.text, expected


def test_compare_report_says_why_a_backend_is_missing(tmp_path):
    comparison = make_comparison()
    comparison["rows"][0] = {"backend": "jax", "status": "not installed", "reason": "pip install jax"}
    comparison["checks"][1]["passed"] = False
    text = write_compare_report(tmp_path, comparison).read_text(encoding="utf-8")
    found = check_alone(text)
    assert "2 of 3 backends ran. 1 of 2 checks failed." in found.text
    assert "jax not installed pip install jax" in found.text
    # Colors stay with their backend although the first has no curve.
    assert 'class="line l0"' not in text and 'class="line l1"' in text and 'class="line l2"' in text


@pytest.mark.parametrize("comparison", [{}, {"rows": [], "checks": []}, {"rows": [{"backend": "jax"}]}])
def test_compare_report_of_almost_nothing(tmp_path, comparison):
    check_alone(write_compare_report(tmp_path, comparison).read_text(encoding="utf-8"))
    assert comparison_table(comparison)


def test_comparison_table_is_aligned_and_says_why():
    comparison = make_comparison()
    comparison["rows"][1] = {
        "backend": "tensorflow",
        "status": "failed",
        "reason": "Traceback:\n  line 3\n\x1b[31mMemoryError\x1b[0m: too\tlarge\n",
    }
    comparison["checks"][1]["passed"] = False
    lines = comparison_table(comparison).split("\n")
    assert lines[4] == "tensorflow  failed: MemoryError: too large"
    figures = "torch 91.20 % 0.2532 1.5e-06 2.5e-07 2.1e-01 1,700 11.5 s - 3 GiB 602.0 s"
    assert " ".join(lines[5].split()) == figures
    ends = [match.end() for match in re.finditer("-+", lines[2])]
    assert len(lines[1]) == len(lines[3]) == len(lines[5]) == ends[-1] <= 120
    for end in ends[1:-1]:
        assert all(line[end : end + 2] == "  " and line[end - 1] != " " for line in (lines[1], lines[3], lines[5]))
    assert lines[-2].startswith("pass  logits    1.5e-06 (limit 1e-05)")
    assert lines[-1].startswith("FAIL  accuracy  0.2 (limit 1.5)")
    assert "\n".join(lines).isascii()


# --- Charts ---


def read_curve(svg: str, log: bool) -> np.ndarray:
    """The y values of the only line in a chart, measured against the labels of its axis as a reader would."""
    ticks = [
        (float(y) - 4, float(label.replace(",", "")))
        for y, label in re.findall(r'<text x="[\d.]+" y="([\d.]+)" text-anchor="end">([^<]+)</text>', svg)
    ]
    at, values = np.array(ticks).T
    slope, offset = np.polyfit(at, np.log(values) if log else values, 1)
    path = re.search(r'class="line l0" d="(M[^"]+)"/></?(?!text)', svg).group(1)
    read = slope * np.array([float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)]) + offset
    return np.exp(read) if log else read


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("scale", [1e-5, 0.3, 1.0, 7e4])
def test_line_chart_draws_its_values(scale, log):
    ys = scale * np.array([3.0, 1.0, 2.5, 0.7, 0.02])
    svg = line_chart({"a": (range(1, 6), ys)}, "T", "x", "y", log=log)
    read = read_curve(svg, log)
    if log:
        np.testing.assert_allclose(np.log(read), np.log(ys), atol=0.02)
    else:
        np.testing.assert_allclose(read, ys, atol=0.005 * ys.max())


AWKWARD = {
    "one point": ([3], [0.5]),
    "nothing": ([], []),
    "only gaps": ([1, 2, 3], [None, math.nan, math.inf]),
    "gaps": ([1, 2, 3, 4, 5], [1.0, math.nan, 2.0, -math.inf, 3.0]),
    "constant": ([1, 2, 3], [5.0, 5.0, 5.0]),
    "zero": ([1, 2], [0.0, 0.0]),
    "negative": ([1, 2], [-1.0, -2.0]),
    "huge": ([1, 2], [1e308, -1e308]),
    "large": ([1, 2], [3e38, 1.0]),
    "tiny": ([1, 2], [1e-300, 5e-324]),
    "close": ([1, 2], [1e9, 1e9 + 1e-6]),
    "infinite x": ([math.inf, 1], [1.0, 2.0]),
    "fractions of x": ([0.1, 0.2, 0.25], [1.0, 2.0, 3.0]),
    "same x": ([2, 2, 2], [1.0, 2.0, 3.0]),
    "numpy": (np.arange(3), np.array([1, np.nan, 2], np.float32)),
}


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("case", AWKWARD)
def test_line_chart_survives(case, log):
    svg = line_chart({case: AWKWARD[case], HOSTILE: ([1], [2.0])}, HOSTILE, HOSTILE, HOSTILE, log=log)
    found = check_alone(svg)
    assert found.all("title") and not found.all("script")
    assert not re.search(r'="[^"]*(?:nan|inf)', re.sub(r"aria\S+|infinite", "", svg))
    numbers = [float(value) for path in found.all("path") for value in re.findall(r"-?[\d.]+", path["d"])]
    assert all(-50 <= value <= 600 for value in numbers)


def test_line_chart_breaks_at_gaps_and_dots_lone_points():
    svg = line_chart({"a": (range(1, 7), [1.0, 2.0, math.nan, 3.0, None, 1.0])}, "T", "x", "y")
    line = re.search(r'class="line l0" d="([^"]+)"', svg).group(1)
    assert (line.count("M"), line.count("L")) == (1, 1)
    assert svg.count('class="spot f0"') == 2


def test_line_chart_of_many_points_is_small_and_keeps_the_spike():
    ys = np.ones(200_000)
    ys[123_456] = 50.0
    svg = line_chart({"a": (np.arange(200_000), ys)}, "T", "x", "y")
    assert len(svg) < 30_000
    assert read_curve(svg, False).max() == pytest.approx(50.0, rel=0.02)


def test_line_chart_refuses_uneven_series():
    with pytest.raises(ValueError, match="2 and 1"):
        line_chart({"a": ([1, 2], [1.0])}, "T", "x", "y")


@pytest.mark.parametrize("low, high", [(0, 1), (0.013, 0.0147), (-3, 17), (1e-9, 2e-9), (5, 5), (0, 123456)])
@pytest.mark.parametrize("whole", [False, True])
def test_ticks_are_round_and_span_the_range(low, high, whole):
    ticks, decimals = nice_ticks(low, high, 6, whole)
    slack = 1e-6 * (ticks[1] - ticks[0])
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack and 2 <= len(ticks) <= 8
    step = ticks[1] - ticks[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - nice) for nice in (1, 2, 2.5, 5)) < 1e-6
    np.testing.assert_allclose(np.diff(ticks), step, rtol=1e-6)
    assert len({f"{tick:.{decimals}f}" for tick in ticks}) == len(ticks)
    assert not whole or all(tick == int(tick) for tick in ticks) or low == high


def test_bar_chart_lengths_are_proportional():
    values = {"a": 10.0, "b": 25.0, "none": None, "nan": math.nan, "zero": 0, "below": -3.0, HOSTILE: 12.5}
    svg = bar_chart(values, "images/s", HOSTILE)
    found = check_alone(svg)
    widths = [float(bar["width"]) for bar in found.all("rect")]
    assert len(widths) == 5  # neither None nor nan has a bar
    np.testing.assert_allclose(np.array(widths) / widths[1], [0.4, 1.0, 0, 0, 0.5], atol=0.002)
    for expected in ("10 images/s", "25 images/s", "12.5 images/s", "not measured", "nan images/s"):
        assert expected in found.text
    check_alone(bar_chart({}, "", "nothing"))


def test_matrix_chart_shows_every_count_and_shades_by_row():
    counts = np.array([[90, 10, 0], [0, 25, 75], [0, 0, 0]])
    svg = matrix_chart(counts, ["a", HOSTILE, "empty"])
    found = check_alone(svg)
    shades = [float(cell["fill-opacity"]) for cell in found.all("rect")]
    np.testing.assert_allclose(shades, np.sqrt([0.9, 0.1, 0.25, 0.75]), atol=1e-3)
    kinds = [cell["class"] for cell in found.all("rect")]
    assert kinds == ["hit", "miss", "hit", "miss"]
    assert re.findall(r">(\d+)</text>", svg) == ["90", "10", "25", "75"]
    assert "10 of 100 a predicted as" in found.text
    assert "115 of 200 images on the diagonal" in found.text


def test_matrix_chart_of_100_classes_degrades():
    counts = np.random.default_rng(0).integers(0, 3, (100, 100))
    svg = matrix_chart(counts, [f"class {index}" for index in range(100)])
    check_alone(svg)
    assert len(svg) < 250_000 and "<rect" not in svg
    drawn = sum(path.count("z") for path in re.findall(r'class="(?:hit|miss)"[^>]* d="([^"]+)"', svg))
    assert drawn == np.count_nonzero(counts)


@pytest.mark.parametrize("counts", [np.zeros((2, 3)), np.full((3, 3), 0.5), -np.eye(3), np.zeros(3)])
def test_matrix_chart_refuses_what_is_no_confusion_matrix(counts):
    with pytest.raises(ValueError, match="confusion matrix"):
        matrix_chart(counts, ["a", "b", "c"])


def linear(color: str) -> np.ndarray:
    """Linear light of an sRGB color, IEC 61966-2-1."""
    value = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


# Full-strength protanopia and deuteranopia in linear light: Machado, Oliveira and Fernandes (2009), table 1.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


def lab(light: np.ndarray) -> np.ndarray:
    """CIE L*a*b* under D65 of linear sRGB light."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(light, 0, 1) / to_xyz.sum(1)
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("colors, paper", [
    (page.SERIES_LIGHT, page.PAPER_LIGHT), (page.SERIES_DARK, page.PAPER_DARK)
])  # fmt: skip
@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_series_colors_can_be_told_apart(colors, paper, deficiency):
    def luminance(color):
        return linear(color) @ [0.2126, 0.7152, 0.0722] + 0.05

    for color in colors:
        contrast = luminance(color) / luminance(paper)
        assert max(contrast, 1 / contrast) >= 3, color
    seen = [lab(np.array(DEFICIENCIES[deficiency]) @ linear(color)) for color in colors]
    # The first three are the backends of a comparison; the others have their dashes besides.
    for (i, one), (j, other) in itertools.combinations(enumerate(seen), 2):
        assert np.linalg.norm(one - other) > (30 if j < 3 else 15), (colors[i], colors[j])


# --- How numbers are written ---


@pytest.mark.parametrize(
    "write, value, expected",
    [
        (page.number, 269722, "269,722"),
        (page.number, 0.0123456, "0.01235"),
        (page.number, 1234.56, "1,235"),
        (page.number, 1.5e-7, "1.500e-07"),
        (page.number, 0.0, "0"),
        (page.number, math.nan, "nan"),
        (page.number, None, "\u2013"),
        (page.number, np.float32(0.5), "0.5000"),
        (page.percent, 0.91525, "91.53 %"),
        (page.percent, 1, "100.00 %"),
        (page.percent, None, "\u2013"),
        (page.duration, 0.42, "0.42 s"),
        (page.duration, 83.44, "83.4 s"),
        (page.duration, 119.97, "2 min 00 s"),
        (page.duration, 3599.9, "1 h 00 min"),
        (page.duration, 7500, "2 h 05 min"),
        (page.duration, math.inf, "inf"),
        (page.size, 0, "0 B"),
        (page.size, 1023, "0.999 KiB"),
        (page.size, 3 * 2**29, "1.5 GiB"),
        (page.size, 5 * 2**40, "5 TiB"),
        (page.size, None, "\u2013"),
        (page.plain, True, "true"),
        (page.plain, [1, "a"], '[1, "a"]'),
    ],
)
def test_numbers_are_written(write, value, expected):
    assert write(value) == expected


# --- The bar ---


class Terminal(io.StringIO):
    encoding = "utf-8"

    def __init__(self, columns: int = 100, encoding: str = "utf-8", live: bool = True):
        super().__init__()
        self.columns, self.encoding, self.live = columns, encoding, live

    def isatty(self) -> bool:
        return self.live

    def screen(self) -> str:
        """What a reader sees: after a carriage return later text covers earlier."""
        lines = []
        for line in re.sub(r"\x1b\[\d*m", "", self.getvalue()).split("\n"):
            shown: list[str] = []
            for part in line.split("\r"):
                shown[: len(part)] = part
            lines.append("".join(shown).rstrip())
        return "\n".join(lines)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets, and an environment without wishes about terminals."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    return now


def drive(bar: Progress, clock, steps: int, seconds: float = 0.25) -> None:
    for step in range(1, steps + 1):
        clock[0] += seconds
        bar.update(step, 128 * step, 2.0 / step)


def test_bar_shows_step_rate_loss_and_time_left(clock):
    stream = Terminal()
    bar = Progress(400, "epoch 3/20", stream)
    clock[0] += 30  # the first step compiles, which must not slow the rate down
    drive(bar, clock, 100)
    line = stream.screen()
    assert line.startswith("epoch 3/20  ━━━━━━──────────────────")
    for expected in (" 25 %", "100/400", "512 images/s", "loss 0.0200", "1:15 left"):
        assert expected in line
    bar.close("epoch 3/20  test accuracy 74.10 %")
    assert stream.screen() == "epoch 3/20  test accuracy 74.10 %\n"


def test_bar_is_drawn_at_most_ten_times_a_second(clock):
    stream = Terminal()
    with Progress(10_000, "epoch", stream) as bar:
        drive(bar, clock, 10_000, seconds=0.001)  # ten seconds
    assert 90 <= stream.getvalue().count("\repoch") <= 101


@pytest.mark.parametrize("columns", [1, 5, 20, 40, 60, 79, 80, 200])
def test_bar_fits_the_terminal(clock, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    bar = Progress(400, "epoch 3/20", stream)
    drive(bar, clock, 200)
    longest = max(len(re.sub(r"\x1b\[\d*m", "", part)) for part in stream.getvalue().split("\r"))
    assert 0 < longest < max(columns, 2)
    bar.close()
    assert stream.screen() == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "no-such-codec"])
def test_bar_falls_back_to_ascii(clock, encoding):
    stream = Terminal(encoding=encoding)
    bar = Progress(4, "epoch", stream)
    drive(bar, clock, 2)
    assert "############------------" in stream.screen()


@pytest.mark.parametrize("name, value, color", [("NO_COLOR", "1", False), ("NO_COLOR", "", True)])
@pytest.mark.skipif(os.name == "nt", reason="a Windows console is asked differently")
def test_bar_honors_no_color(clock, monkeypatch, name, value, color):
    monkeypatch.setenv(name, value)
    stream = Terminal()
    drive(Progress(4, "epoch", stream), clock, 2)
    assert ("\x1b[" in stream.getvalue()) is color


@pytest.mark.parametrize("dumb", [False, True])
def test_log_gets_plain_lines_and_few(clock, monkeypatch, dumb):
    if dumb:
        monkeypatch.setenv("TERM", "dumb")
    stream = Terminal(live=dumb)
    with Progress(400, "epoch 3/20", stream, every_seconds=30) as bar:
        drive(bar, clock, 400)  # 100 seconds
        bar.close("epoch 3/20  loss 0.8012")
    lines = stream.getvalue().split("\n")
    assert len(lines) == 5 and lines[-2:] == ["epoch 3/20  loss 0.8012", ""]
    assert lines[0] == "epoch 3/20  120/400  512 images/s  loss 0.0167  1:10 left"
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_log_tells_within_an_epoch_without_being_asked_to(clock):
    """At least every ten seconds, where nobody watches a bar."""
    stream = Terminal(live=False)
    drive(Progress(400, "epoch 3/20", stream), clock, 400)  # 100 seconds
    assert 9 <= len(stream.getvalue().splitlines()) <= 10


def test_log_of_a_short_epoch_is_its_last_line_alone(clock):
    stream = Terminal(live=False)
    with Progress(100, "epoch", stream) as bar:
        drive(bar, clock, 100, seconds=0.09)
        bar.close("done")
        bar.close("twice")
    assert stream.getvalue() == "done\n"


def test_bar_is_gone_before_a_traceback(clock):
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), Progress(100, "epoch", stream) as bar:
        drive(bar, clock, 10)
        raise KeyboardInterrupt
    assert stream.screen() == ""


def test_loss_is_converted_only_when_drawn(clock):
    class Device:
        asked = 0

        def __float__(self):
            Device.asked += 1
            return math.nan

    stream = Terminal()
    bar = Progress(1000, "epoch", stream)
    for step in range(1, 1001):
        clock[0] += 0.001
        bar.update(step, step, Device())
    assert Device.asked <= 11
    assert "loss nan" in stream.screen()


class Broken(Terminal):
    def write(self, text):
        raise BrokenPipeError


@pytest.mark.parametrize("kind", ["broken", "closed", "none"])
def test_a_lost_stream_does_not_end_a_training(clock, monkeypatch, kind):
    stream = Broken() if kind == "broken" else Terminal()
    if kind == "closed":
        stream.close()
    monkeypatch.setattr(sys, "stderr", None)
    with Progress(10, "epoch", None if kind == "none" else stream) as bar:
        drive(bar, clock, 10)
        bar.close("done")


def test_update_is_cheap():
    bar = Progress(10**9, "epoch", Terminal(live=False))
    start = time.perf_counter()
    for step in range(50_000):
        bar.update(step, step, None)
    assert (time.perf_counter() - start) / 50_000 < 10e-6


# --- The machine ---


def in_child(code: str, **environ: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, **environ},
    )
    return json.loads(done.stdout)


def test_report_imports_no_backend():
    found = in_child(
        "import json, sys; from kvision.report import versions, hardware; versions(); hardware();"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    assert not {"jax", "tensorflow", "torch", "keras", "matplotlib", "tensorboard"} & set(found)


def test_versions_come_from_the_installed_packages(monkeypatch):
    known = {"keras": "3.15.1", "numpy": "2.4", "jax": "0.10", "jaxlib": "0.11", "tensorflow-cpu": "2.21"}
    monkeypatch.setattr(environment, "_installed", known.get)
    base = {"python": ".".join(map(str, sys.version_info[:3])), "kvision": kvision.__version__}
    base |= {"keras": "3.15.1", "numpy": "2.4"}
    assert versions("jax") == base | {"jax": "0.10", "jaxlib": "0.11"}
    assert versions("tensorflow") == base | {"tensorflow-cpu": "2.21"}
    assert versions("torch") == base
    monkeypatch.delitem(sys.modules, "keras", raising=False)
    assert versions() == base | {"jax": "0.10", "jaxlib": "0.11", "tensorflow-cpu": "2.21"}


def test_versions_of_this_environment():
    assert versions()["numpy"] == np.__version__


def test_hardware_is_plausible():
    found = hardware()
    assert list(found) == ["cpu", "cores", "memory_bytes", "gpus", "system"]
    assert found["cpu"] and found["system"]
    assert 1 <= found["cores"] <= os.cpu_count()
    assert found["memory_bytes"] is None or 2**28 < found["memory_bytes"] < 2**50
    json.dumps(found)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux has CPU affinity")
def test_cores_are_those_lent_to_the_process():
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{one}}}); from kvision.report import hardware;"
    assert in_child(code + "print(hardware()['cores'])") == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no resource module")
def test_peak_memory_grows_with_an_allocation_and_stays():
    before, after, freed = in_child(
        "import numpy as np; from kvision.report import peak_memory_bytes as peak;"
        "a = peak(); x = np.ones(8_000_000); b = peak(); del x; print([a, b, peak()])"
    )
    assert 60e6 < after - before < 80e6
    assert freed > after - 2e6  # the kernel counts pages a batch at a time


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone carries the peak over from the parent")
def test_peak_memory_is_the_childs_own():
    large = np.ones(40_000_000)  # 320 MB in this process
    child = in_child("from kvision.report import peak_memory_bytes; print(peak_memory_bytes())")
    assert child < large.nbytes / 2 < peak_memory_bytes()


def test_peak_memory_without_the_systems_answer(monkeypatch):
    monkeypatch.setattr(environment, "_read", lambda path: "")
    if os.name != "nt":
        assert peak_memory_bytes() > 10e6
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory_bytes() is None


def test_seconds_since_process_start(monkeypatch):
    code = "import time; time.sleep(0.3); from kvision.report import seconds_since_process_start as seconds;"
    start = time.perf_counter()
    inside = in_child(code + "print(seconds())")
    around = time.perf_counter() - start
    assert inside <= around + 0.02
    assert sys.platform != "linux" or inside >= 0.3
    first = seconds_since_process_start()
    assert 0 <= seconds_since_process_start() - first < 1
    monkeypatch.setattr(environment, "_read", lambda path: "")
    known = time.perf_counter() - environment._IMPORTED
    assert seconds_since_process_start() == pytest.approx(known, abs=0.1)
