"""Charts as inline SVG strings, without scripts and without a plotting library.

Colors and fonts come from the style sheet of `kvision.report.page`, so a chart suits light and dark pages. Text is
escaped, every chart has a `<title>` and a `<desc>` for screen readers, and nan or inf is a gap.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from kvision.report.page import escape, finite, number

WIDTH = 520
# Curves of runs that agree overlap; dashes show the lower one.
DASHES = ("", "9 6", "3 5", "12 4 3 4", "5 3", "1.5 3")
MOST_POINTS = 800  # points of a series at most
LARGEST = 1e100  # larger values are gaps, so that differences and ticks stay within float64
MOST_DRAWN = 1000  # classes of a confusion matrix at most; its cells are then two points wide
MOST_COUNTED = 30  # classes up to which the cells of a confusion matrix have numbers


def _clip(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start", extra: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    anchor = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{kind}{anchor}{extra}>{escape(text)}</text>'


def _svg(width: float, height: float, title: str, description: str, body: Sequence[str], kind: str = "chart") -> str:
    return (
        f'<svg class="{kind}" role="img" viewBox="0 0 {width:.0f} {height:.0f}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(body)}</svg>"
    )


def nice_ticks(low: float, high: float, most: int = 6, whole: bool = False) -> tuple[list[float], int]:
    """At most `most` + 1 round numbers that span [low, high], and their number of decimals.

    Steps are 1, 2, 2.5 or 5 times a power of ten; with `whole` they are whole numbers (epochs, steps).
    """
    if not high > low:
        margin = 0.5 if whole else (abs(low) * 0.1 or 1.0)
        low, high = low - margin, high + margin
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    factors = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(factor * power for factor in factors if factor * power >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    decimals = next((d for d in range(15) if abs(step - round(step, d)) < step * 1e-6), 15)
    return [index * step for index in range(first, last + 1)], decimals


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that span [low, high], thinned to about six."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    every = math.ceil((last - first) / 6)
    last = first + every * math.ceil((last - first) / every)
    return [10.0**power for power in range(first, last + 1, every)]


def _thin(xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `MOST_POINTS` points: the lowest and the highest of each bucket, which keeps spikes."""
    if len(xs) <= MOST_POINTS:
        return xs, ys
    keep = {0, len(xs) - 1}
    edges = np.linspace(0, len(xs), MOST_POINTS // 2).astype(int)
    for start, stop in itertools.pairwise(edges):
        bucket = ys[start:stop]
        gaps = np.flatnonzero(np.isnan(bucket))
        if len(gaps):
            keep.add(start + int(gaps[0]))
        if len(gaps) < len(bucket):
            keep |= {start + int(np.nanargmin(bucket)), start + int(np.nanargmax(bucket))}
    chosen = sorted(keep)
    return xs[chosen], ys[chosen]


def _points(xs: Sequence, ys: Sequence, log: bool) -> tuple[np.ndarray, np.ndarray]:
    """The series as float64, with nan for gaps; points without a finite x are dropped."""
    pairs = [(finite(x), finite(y)) for x, y in zip(xs, ys, strict=True)]
    kept = [(x, y) for x, y in pairs if x is not None and abs(x) < LARGEST]
    x = np.array([pair[0] for pair in kept], dtype=np.float64)
    y = np.array([np.nan if pair[1] is None else pair[1] for pair in kept], dtype=np.float64)
    y[~(np.abs(y) < LARGEST)] = np.nan
    if log:
        y[~(y > 1 / LARGEST)] = np.nan
    return x, y


def line_chart(
    series: Mapping[str, tuple[Sequence, Sequence]],
    title: str,
    x_label: str,
    y_label: str,
    *,
    log: bool = False,
    zero: bool = False,
    height: int = 300,
) -> str:
    """A line chart as an SVG string.

    Args:
        series: name -> (xs, ys) of equal length, drawn in this order. None, nan and inf in ys are gaps; a
            point between gaps is a dot. A series without points is left out but keeps its color, so that
            neighboring charts use the same colors.
        title, x_label, y_label: plain text.
        log: logarithmic y axis; values that are not positive are gaps.
        zero: the y axis starts at zero if no value is negative.
        height: in units of the drawing, which is 520 wide.

    Raises:
        ValueError: xs and ys of a series differ in length.
    """
    drawn = {}
    for index, (name, (xs, ys)) in enumerate(series.items()):
        if len(xs) != len(ys):
            raise ValueError(f"series {name!r} must have as many xs as ys, got {len(xs)} and {len(ys)}")
        x, y = _points(xs, ys, log)
        if np.isfinite(y).any():
            drawn[name] = (index, x, y)
    body = [_text(0, 14, title, "name")]
    if not drawn:
        body.append(_text(WIDTH / 2, height / 2, "no values", anchor="middle"))
        return _svg(WIDTH, height, title, "no values", body)

    # The legend is a row below the title, which wraps; a single series has none.
    x_at, y_at = 0.0, 36.0 if len(series) > 1 else 18.0
    for name, (index, _, _) in drawn.items() if len(series) > 1 else ():
        shown = _clip(name, 40)
        wide = 30 + 7 * len(shown)
        if x_at and x_at + wide > WIDTH:
            x_at, y_at = 0.0, y_at + 18
        body.append(f'<path class="line l{index % 6}" d="M{x_at:.0f} {y_at - 4:.0f}h22"{_dash(index)}/>')
        body.append(_text(x_at + 28, y_at, shown, "ink"))
        x_at += wide + 14

    finite_y = np.concatenate([y[np.isfinite(y)] for _, _, y in drawn.values()])
    finite_x = np.concatenate([x[np.isfinite(y)] for _, x, y in drawn.values()])
    low, high = float(finite_y.min()), float(finite_y.max())
    if log:
        y_ticks = _log_ticks(low, high)
        y_names = [f"{tick:.0e}" if abs(math.log10(tick)) > 3.5 else f"{tick:g}" for tick in y_ticks]
    else:
        y_ticks, decimals = nice_ticks(min(low, 0.0) if zero else low, high, 5)
        huge = max(abs(tick) for tick in y_ticks) >= 1e7 or decimals > 6
        y_names = [f"{tick:.3g}" if huge else f"{tick + 0.0:,.{decimals}f}" for tick in y_ticks]
    whole = bool((finite_x == np.round(finite_x)).all())
    x_low, x_high = float(finite_x.min()), float(finite_x.max())
    x_ticks, decimals = nice_ticks(x_low, x_high, 8, whole)
    x_ticks = [tick for tick in x_ticks if x_low <= tick <= x_high] or [x_low]
    x_names = [f"{tick:,.{decimals}f}" if abs(tick) < 1e7 else f"{tick:.3g}" for tick in x_ticks]
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5

    top, bottom = y_at + 34, height - 42.0
    left, right = 10 + 7 * max(4, *(len(name) for name in y_names)), WIDTH - 6
    first, last = y_ticks[0], y_ticks[-1]

    def place_x(x):
        return left + (x - x_low) / (x_high - x_low) * (right - left)

    def place_y(y):
        share = np.log(y / first) / math.log(last / first) if log else (y - first) / (last - first)
        return bottom - share * (bottom - top)

    body.append(_text(0, top - 14, y_label))
    for tick, name in zip(y_ticks, y_names, strict=True):
        at = float(place_y(tick))
        body.append(f'<path class="{"axis" if tick == first else "grid"}" d="M{left} {at:.1f}H{right}"/>')
        body.append(_text(left - 8, at + 4, name, anchor="end"))
    for tick, name in zip(x_ticks, x_names, strict=True):
        body.append(_text(place_x(tick), bottom + 18, name, anchor="middle"))
    body.append(_text((left + right) / 2, height - 6, x_label, anchor="middle"))

    described = []
    for name, (index, x, y) in drawn.items():
        shown = np.flatnonzero(np.isfinite(y))
        described.append(f"{name}: first {number(y[shown[0]])}, last {number(y[shown[-1]])}")
        body += _curve(name, index, x, y, place_x, place_y, x_label)
    return _svg(WIDTH, height, title, "; ".join(described), body)


def _dash(index: int) -> str:
    dash = DASHES[index % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _curve(name: str, index: int, x: np.ndarray, y: np.ndarray, place_x, place_y, x_label: str) -> list[str]:
    """The line of one series, dots for points between gaps, and tooltips if there are few points."""
    few = len(x) <= 100
    x, y = _thin(x, y)
    across, down = place_x(x), place_y(y)
    good = np.isfinite(y)
    alone = good & ~np.r_[False, good[:-1]] & ~np.r_[good[1:], False]
    path = "".join(
        f"{'L' if at and good[at - 1] else 'M'}{across[at]:.1f} {down[at]:.1f}" for at in np.flatnonzero(good & ~alone)
    )
    parts = [f'<path class="line l{index % 6}" d="{path}"{_dash(index)}/>'] if path else []
    radius = max(2.5, 5.0 - index)  # later series have smaller dots, so that equal points are visible
    for at in np.flatnonzero(good if few else alone):
        kind, r = ("spot", radius) if alone[at] else ("touch", 6)
        label = escape(f"{name}: {number(y[at], 6)} at {x_label} {number(x[at])}")
        parts.append(
            f'<circle class="{kind} f{index % 6}" cx="{across[at]:.1f}" cy="{down[at]:.1f}" r="{r}">'
            f"<title>{label}</title></circle>"
        )
    return parts


def bar_chart(values: Mapping[str, float | None], unit: str, title: str) -> str:
    """Horizontal bars from zero, one a name, as an SVG string.

    Args:
        values: name -> value in `unit`, from top to bottom; None, nan and inf have a text but no bar.
        unit: follows every value; may be empty.
        title: plain text.
    """
    known = {name: finite(value) for name, value in values.items()}
    longest = max([abs(value) for value in known.values() if value is not None], default=0.0) or 1.0
    names = [_clip(str(name), 24) for name in values]
    texts = [("not measured" if value is None else f"{number(value, 3)} {unit}".strip()) for value in values.values()]
    left = 14 + 7 * max((len(name) for name in names), default=0)
    room = WIDTH - left - 14 - 7.2 * max((len(text) for text in texts), default=0)
    body = [_text(0, 14, title, "name")]
    for index, (full, name, text) in enumerate(zip(values, names, texts, strict=True)):
        at = 34 + 30 * index
        value = known[full]
        long = max(0.0, value or 0.0) / longest * max(room, 40)
        body.append(_text(left - 12, at + 14, name, "ink", "end"))
        if value is not None:
            body.append(
                f'<rect class="f{index % 6}" x="{left}" y="{at}" width="{long:.1f}" height="20">'
                f"<title>{escape(f'{full}: {text}')}</title></rect>"
            )
        body.append(_text(left + long + 8, at + 14, text, "ink" if value is not None else ""))
    bottom = 34 + 30 * len(values)
    body.append(f'<path class="axis" d="M{left} 28V{bottom - 4}"/>')
    described = "; ".join(f"{name}: {text}" for name, text in zip(values, texts, strict=True)) or "no values"
    return _svg(WIDTH, bottom, title, described, body)


def confusion_cells(confusion: np.ndarray | Mapping[tuple[int, int], int], classes: Sequence[str]) -> np.ndarray:
    """The nonzero cells of a confusion matrix, sorted: int64 (m, 3), rows of true class, predicted class and count.

    Args:
        confusion: counts of shape (k, k) for k classes, with the true class as row, or {(true, predicted): count}.

    Raises:
        ValueError: another shape, an unknown class, or values other than counts.
    """
    count = len(classes)
    if isinstance(confusion, Mapping):
        cells = np.array([(*pair, value) for pair, value in sorted(confusion.items())]).reshape(-1, 3)
        if len(cells) and not (cells[:, :2].min() >= 0 and cells[:, :2].max() < count):
            raise ValueError(f"expected classes 0 to {count - 1} in the confusion matrix")
        values = cells[:, 2]
    else:
        cells = values = np.asarray(confusion)
        if cells.shape != (count, count) or not count:
            raise ValueError(f"expected a confusion matrix of shape {(count, count)}, got {cells.shape}")
    if not np.array_equal(values, values.astype(np.int64)) or values.min(initial=0) < 0:
        raise ValueError("expected counts in the confusion matrix: whole numbers, none negative")
    if not isinstance(confusion, Mapping):
        indices = np.argwhere(cells)
        cells = np.column_stack([indices, cells[tuple(indices.T)]])
    return cells.astype(np.int64)


def matrix_chart(
    confusion: np.ndarray | Mapping[tuple[int, int], int], classes: Sequence[str], title: str = "Confusion matrix"
) -> str:
    """A confusion matrix as a heat map, an SVG string.

    A cell is shaded by the square root of its fraction of the row, which keeps rare errors visible: correct predictions
    are blue, errors orange. Up to 30 classes a cell has its count and a tooltip with its names; with more classes the
    axes have class numbers.

    Args:
        confusion, raises: see `confusion_cells`.
        classes: k names, `MOST_DRAWN` at most.
    """
    cells = confusion_cells(confusion, classes)
    k = len(classes)
    if k > MOST_DRAWN:
        raise ValueError(f"expected at most {MOST_DRAWN:,} classes, got {k:,}")
    counts = np.zeros((k, k), np.int64)
    counts[cells[:, 0], cells[:, 1]] = cells[:, 2]
    totals = counts.sum(1)
    shares = counts / np.maximum(totals, 1)[:, None]
    names = [_clip(str(name), 16) for name in classes]
    if k <= MOST_COUNTED:
        cell = min(60.0, max(24.0, 620 / k))
        margin = 34 + 7 * max(len(name) for name in names)
    else:
        cell, margin = max(2.0, 640 / k), 64.0
    side = cell * k
    top = margin * 0.75 + 34 if k <= MOST_COUNTED else 66.0
    slant = margin * 0.6 if k <= MOST_COUNTED else 10.0  # room for the last slanted column name
    width, height = margin + side + slant, top + side + 4
    body = [
        _text(margin, 14, "predicted class"),
        _text(
            14,
            top + side / 2,
            "true class",
            "",
            "middle",
            f' transform="rotate(-90 14 {top + side / 2:.1f})"',
        ),
    ]
    strength = np.sqrt(shares)
    if k <= MOST_COUNTED:
        size = min(13.0, cell * 0.42)
        for index, name in enumerate(names):
            at = margin + (index + 0.5) * cell
            body.append(_text(at, top - 10, name, "ink", "start", f' transform="rotate(-45 {at:.1f} {top - 10:.1f})"'))
            body.append(_text(margin - 10, top + (index + 0.5) * cell + 4, name, "ink", "end"))
        for row, column in np.argwhere(counts):
            count, x, y = int(counts[row, column]), margin + column * cell, top + row * cell
            label = f"{count:,} of {totals[row]:,} {classes[row]} predicted as {classes[column]}"
            if row == column:
                label = f"{count:,} of {totals[row]:,} {classes[row]} correct"
            body.append(
                f'<rect class="{"hit" if row == column else "miss"}" x="{x:.1f}" y="{y:.1f}" '
                f'width="{cell:.1f}" height="{cell:.1f}" fill-opacity="{strength[row, column]:.3f}">'
                f"<title>{escape(label)}</title></rect>"
            )
            kind = "on" if strength[row, column] > 0.7 else "ink"
            middle = y + cell / 2 + size * 0.36
            points = min(size, 1.6 * cell / max(3, len(str(count))))
            style = f' style="font-size:{points:.1f}px;pointer-events:none"'
            body.append(_text(x + cell / 2, middle, f"{count}", kind, "middle", style))
        lines = np.arange(k + 1)
    else:
        # One path for each of eight shades, instead of thousands of cells, keeps the page small.
        level = np.ceil(strength * 8).astype(int)
        for kind, mask in (("hit", np.eye(k, dtype=bool)), ("miss", ~np.eye(k, dtype=bool))):
            for shade in range(1, 9):
                cells = np.argwhere(mask & (level == shade))
                path = "".join(
                    f"M{margin + c * cell:.1f} {top + r * cell:.1f}h{cell:.1f}v{cell:.1f}h-{cell:.1f}z"
                    for r, c in cells
                )
                if path:
                    body.append(f'<path class="{kind}" fill-opacity="{shade / 8:.3f}" d="{path}"/>')
        ticks = [round(tick) for tick in nice_ticks(0, k - 1, 10, whole=True)[0] if tick < k]
        for tick in ticks:
            body.append(_text(margin + (tick + 0.5) * cell, top - 8, str(tick), "", "middle"))
            body.append(_text(margin - 8, top + (tick + 0.5) * cell + 4, str(tick), "", "end"))
        lines = np.array([0, k])
    path = "".join(
        f"M{margin + at * cell:.1f} {top:.1f}v{side:.1f}M{margin:.1f} {top + at * cell:.1f}h{side:.1f}" for at in lines
    )
    body.append(f'<path class="grid" d="{path}"/>')
    right = int(np.trace(counts))
    described = f"{k} classes; {right:,} of {int(counts.sum()):,} images on the diagonal"
    svg = _svg(width, height, title, described, body, "chart matrix")
    # A small matrix is not enlarged to the width of the page.
    return svg.replace("<svg ", f'<svg style="max-width:{width:.0f}px" ', 1)
