"""The page of a run: accuracy, curves, confusion matrix, top losses, speed and environment."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kvision.files import write_text
from kvision.report import page
from kvision.report.page import MISSING, duration, escape, finite, fixed, number, percent, plain, size
from kvision.report.svg import MOST_COUNTED, MOST_DRAWN, confusion_cells, line_chart, matrix_chart

# Entries of a result that have their place on the page; all others are listed at its end.
_SHOWN = {
    "dataset", "model", "backend", "test_accuracy", "test_loss", "train_seconds", "images_per_second",
    "seconds_to_first_step", "compile_seconds", "peak_memory_bytes", "parameters", "seed", "weights_sha256",
    "versions", "hardware", "command", "note", "tta", "tta_accuracy",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class MisclassifiedExample:
    """A misclassified image.

    Args:
        image: uint8, shape (height, width, channels) with 1 (gray) or 3 (red, green, blue) channels.
        true, predicted: names of the two classes.
        confidence: the model's probability of the predicted class, 0 to 1.

    Raises:
        ValueError: an image of another shape or dtype.
    """

    image: np.ndarray
    true: str
    predicted: str
    confidence: float

    def __post_init__(self):
        image = self.image
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3) or 0 in image.shape:
            raise ValueError(
                f"expected a uint8 image (height, width, 1 or 3), got {image.dtype} of shape {image.shape}"
            )


def png_uri(image: np.ndarray) -> str:
    """A uint8 image of shape (height, width, 1 or 3) as a data URI of a PNG."""
    buffer = io.BytesIO()
    array = image[..., 0] if image.shape[-1] == 1 else image
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def column(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list, list]:
    """(epochs, values of `key`) of the rows that have it; a row without "epoch" counts by its position from 1."""
    rows = [(row.get("epoch") or position, row.get(key)) for position, row in enumerate(history, 1)]
    return [epoch for epoch, value in rows if value is not None], [value for _, value in rows if value is not None]


def fractions_to_percent(pairs: tuple[list, list]) -> tuple[list, list]:
    """The same points with fractions in percent; values that are not finite become None."""
    epochs, values = pairs
    return epochs, [None if finite(value) is None else 100 * float(value) for value in values]


def _curves(history: Sequence[Mapping[str, Any]], rates: tuple[Sequence, Sequence] | None) -> str:
    if not history:
        return '<p class="quiet">No epoch was recorded.</p>'
    charts = [
        line_chart(
            {"train": column(history, "loss"), "test": column(history, "test_loss")},
            "Loss",
            "epoch",
            "mean over the epoch",
        ),
        line_chart(
            {
                "train": fractions_to_percent(column(history, "accuracy")),
                "test": fractions_to_percent(column(history, "test_accuracy")),
            },
            "Accuracy",
            "epoch",
            "accuracy, %",
        ),
        line_chart(
            {"learning rate": rates or column(history, "learning_rate")},
            "Learning rate",
            "epoch",
            "rate",
            zero=True,
        ),
        line_chart({"training": column(history, "images_per_second")}, "Speed", "epoch", "images/s", zero=True),
    ]
    return f'<div class="charts">{"".join(charts)}</div>'


def _epochs(history: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            number(row.get("epoch") or position),
            fixed(row.get("loss"), ".4f"),
            percent(row.get("accuracy")),
            fixed(row.get("test_loss"), ".4f"),
            percent(row.get("test_accuracy")),
            number(row.get("learning_rate")),
            fixed(row.get("seconds"), ".2f"),
            fixed(row.get("images_per_second"), ",.0f"),
        ]
        for position, row in enumerate(history, 1)
    ]
    heads = (
        "epoch",
        "loss",
        "accuracy",
        "test loss",
        "test accuracy",
        "learning rate",
        "seconds",
        "images/s",
    )
    rows = [[escape(cell) for cell in row] for row in rows]
    return f"<details><summary>All epochs as a table</summary>{page.table(heads, rows, range(8))}</details>"


def _classes(cells: np.ndarray, classes: Sequence[str]) -> str:
    """A table of the accuracy of each class; of many classes the worst ones, and the others collapsed.

    Args:
        cells: as `kvision.report.svg.confusion_cells` returns them.
    """
    totals, correct = np.zeros((2, len(classes)), np.int64)
    np.add.at(totals, cells[:, 0], cells[:, 2])
    hits = cells[cells[:, 0] == cells[:, 1]]
    correct[hits[:, 0]] = hits[:, 2]
    confused = {}  # by class, the most frequent wrong prediction and its count
    for true, predicted, count in cells[cells[:, 0] != cells[:, 1]].tolist():
        if count > confused.get(true, (0, 0))[1]:
            confused[true] = predicted, count
    shares = np.where(totals, correct / np.maximum(totals, 1), np.inf)
    order, shown = range(len(classes)), len(classes)
    if len(classes) > MOST_COUNTED:
        order, shown = np.argsort(shares, kind="stable").tolist(), 20
    rows = []
    for index in order if len(classes) <= MOST_DRAWN else order[:shown]:
        other = f"{escape(classes[confused[index][0]])} ({confused[index][1]:,})" if index in confused else MISSING
        share = float(shares[index]) if totals[index] else None
        bar = f'<span class="bar"><i style="width:{100 * (share or 0):.1f}%"></i></span>'
        name = escape(classes[index])
        rows.append([name, f"{correct[index]:,}", f"{totals[index]:,}", percent(share), bar, other])
    heads = ("class", "correct", "images", "accuracy", "", "most frequent error")

    def table(part):
        return page.table(heads, part, (1, 2, 3))

    if len(classes) <= MOST_COUNTED:
        return table(rows)
    rest = f"<details><summary>The other {len(rows) - shown} classes</summary>{table(rows[shown:])}</details>"
    return f"<h3>The {shown} worst of {len(classes)} classes</h3>{table(rows[:shown])}{rest if rows[shown:] else ''}"


def _examples(mistakes: Sequence[MisclassifiedExample]) -> str:
    figures = []
    for mistake in mistakes:
        kind = ' class="small"' if max(mistake.image.shape[:2]) <= 64 else ""
        text = f"{mistake.true} predicted as {mistake.predicted}"
        figures.append(
            f'<figure><img{kind} src="{png_uri(mistake.image)}" alt="{escape(text)}">'
            f'<figcaption>true: <b>{escape(mistake.true)}</b><br><span class="quiet">predicted:</span> '
            f'<b class="bad">{escape(mistake.predicted)}</b><br>'
            f'<span class="quiet">confidence {escape(percent(mistake.confidence))}</span></figcaption></figure>'
        )
    return (
        f'<div class="images">{"".join(figures)}</div>' if figures else '<p class="quiet">No misclassified image.</p>'
    )


def _speed(result: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> str:
    seconds = [known for row in history if (known := finite(row.get("seconds"))) is not None]
    pairs = [
        ("Training", fixed(result.get("images_per_second"), ",.0f") + " images/s"),
        (
            "Time per epoch",
            f"{duration(float(np.median(seconds)))} (median of {len(seconds)})" if seconds else MISSING,
        ),
        ("Total training time", duration(result.get("train_seconds"))),
        ("Process start to first step", duration(result.get("seconds_to_first_step"))),
        ("Compilation", duration(result.get("compile_seconds"))),
        ("Peak memory of the process", size(result.get("peak_memory_bytes"))),
    ]
    return page.definition_table((name, MISSING if value.startswith(MISSING) else value) for name, value in pairs)


def write_report(
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    result: Mapping[str, Any],
    confusion: np.ndarray | Mapping[tuple[int, int], int],
    classes: Sequence[str],
    mistakes: Sequence[MisclassifiedExample],
    learning_rates: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Path:
    """Write `report.html` into `folder`: a self-contained file without scripts.

    Args:
        folder: created if missing. The page is written atomically.
        config: the run's configuration by name.
        history: one row an epoch with any of epoch (from 1), loss, accuracy, test_loss, test_accuracy,
            learning_rate, seconds, images_per_second. Accuracies are fractions from 0 to 1. Missing values and
            None are left out.
        result: any of dataset, model, backend, test_accuracy (0 to 1), test_loss, tta (a name in `kvision.data.tta`)
            and tta_accuracy (0 to 1), train_seconds, images_per_second,
            seconds_to_first_step, compile_seconds, peak_memory_bytes, parameters, seed, weights_sha256, versions and
            hardware (dictionaries), command, note. Other entries are listed at the end.
        confusion: counts on the test images, shape (k, k), row true class, column predicted class; or {(true,
            predicted): count}. The matrix is drawn for at most `kvision.report.svg.MOST_DRAWN` classes.
        classes: k names.
        mistakes: misclassified images, in this order.
        learning_rates: positions in epochs from 0, and the learning rates there; None takes those of the history, at
            the end of each epoch.

    Returns:
        The path of the page.

    Raises:
        ValueError: a confusion matrix of another number of classes, or with values other than counts.
    """
    cells = confusion_cells(confusion, classes)
    correct, total = int(cells[cells[:, 0] == cells[:, 1], 2].sum()), int(cells[:, 2].sum())
    model, dataset, backend = (str(result.get(key) or "unnamed") for key in ("model", "dataset", "backend"))
    accuracy = finite(result.get("test_accuracy"))
    small = f"{correct:,} of {total:,} images"
    if accuracy is not None and 0 <= accuracy <= 1 and total:
        # The standard error of a fraction of `total` images.
        small += f", standard error {100 * math.sqrt(accuracy * (1 - accuracy) / total):.2f} points"
    header = [
        f"<h1>{escape(model)} on {escape(dataset)}</h1>",
        f'<p class="score"><strong>{escape(percent(result.get("test_accuracy")))}</strong> test accuracy '
        f"of {escape(model)} on {escape(dataset)} with the {escape(backend)} backend</p>",
    ]
    if result.get("note"):
        header.append(f'<p class="note">{escape(result["note"])}</p>')
    augmented = []
    if result.get("tta_accuracy") is not None:
        text = f"averaged logits ({result.get('tta')}); curves and examples are without"
        augmented.append(("With test-time augmentation", percent(result["tta_accuracy"]), text))
    header.append(
        page.stat_cards(
            [
                ("Test accuracy", percent(result.get("test_accuracy")), small),
                *augmented,
                ("Test loss", fixed(result.get("test_loss"), ".4f"), "mean over the test images"),
                ("Parameters", number(result.get("parameters")), "trainable"),
                (
                    "Training",
                    duration(result.get("train_seconds")),
                    f"{len(history)} epoch{'s' * (len(history) != 1)}",
                ),
                ("Speed", fixed(result.get("images_per_second"), ",.0f"), "training images per second"),
            ]
        )
    )
    drawn = len(classes) <= MOST_DRAWN
    shade = "shaded by their fraction of the row" if len(classes) <= MOST_COUNTED else "classes are numbered from 0"
    environment = [("command", f"`{result['command']}`")] if result.get("command") else []
    environment.append(("seed", plain(result.get("seed"))))
    if result.get("weights_sha256"):
        environment.append(("weights sha256", f"`{result['weights_sha256']}`"))
    intro = f"{total:,} test images; correct predictions are blue, errors orange, {shade}."
    matrix = page.section("Confusion matrix", matrix_chart(confusion, classes), intro=intro) if drawn else ""
    sections = [
        page.section("Curves", _curves(history, learning_rates), _epochs(history) if history else ""),
        matrix,
        page.section("Accuracy by class", _classes(cells, classes)),
        page.section(
            "Top losses",
            _examples(mistakes),
            intro="Misclassified images with the highest confidence." if mistakes else "",
        ),
        page.section("Speed", _speed(result, history)),
        page.environment_section(result.get("versions") or {}, result.get("hardware") or {}, environment),
        page.section("Configuration", page.definition_table((key, plain(value)) for key, value in config.items())),
    ]
    others = [(key, plain(value)) for key, value in result.items() if key not in _SHOWN]
    if others:
        sections.append(page.section("Further results", page.definition_table(others)))
    title = f"{model} on {dataset}, {backend}: {percent(result.get('test_accuracy'))}"
    return write_text(Path(folder) / "report.html", page.document(title, "".join(header), *sections))
