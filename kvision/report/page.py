"""HTML pages of reports: style sheet, layout and number formats.

A page is one file without scripts, fonts or links, so that it can be mailed, archived and opened offline.
"""

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MISSING = "\u2013"  # an en dash

# HTML does not allow control characters, and class names may come from folder names.
_CONTROL = dict.fromkeys((*range(9), 11, *range(14, 32), 127), "\ufffd")


def escape(value: Any) -> str:
    """The text of `value`, safe inside HTML elements and quoted attributes."""
    return html.escape(str(value).translate(_CONTROL), quote=True)


def finite(value: Any) -> float | None:
    """`value` as a float if it is a finite number, else None (also for text and bool)."""
    if value is None or isinstance(value, str | bytes | bool):
        return None
    try:
        value = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def number(value: Any, digits: int = 4) -> str:
    """A number with `digits` significant digits, whole numbers in full with thousands separators.

    None gives a dash. "nan" and "inf" are printed as such, so that a diverged run differs from a missing value.
    """
    if value is None:
        return MISSING
    known = finite(value)
    if known is None:
        return str(value)
    if known == int(known) and abs(known) < 1e15:
        return f"{int(known):,}"
    if not 1e-3 <= abs(known) < 1e15:
        return f"{known:.{digits - 1}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(known))))
    return f"{known:,.{decimals}f}"


def fixed(value: Any, form: str) -> str:
    """`value` in the format `form` (such as ".4f") where it is finite, else as `number` writes it."""
    known = finite(value)
    return number(value) if known is None else format(known, form)


def percent(value: Any) -> str:
    """A share from 0 to 1 as a percentage with two decimals."""
    known = finite(value)
    return number(value) if known is None else f"{100 * known:.2f} %"


def duration(value: Any) -> str:
    """Seconds in readable units: "0.42 s", "83.4 s", "4 min 12 s", "2 h 05 min"."""
    known = finite(value)
    if known is None:
        return number(value)
    if known < 119.95:
        return f"{known:.2f} s" if known < 10 else f"{known:.1f} s"
    if known < 3599.5:
        return f"{round(known) // 60} min {round(known) % 60:02d} s"
    minutes = round(known / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(value: Any) -> str:
    """Bytes in binary units with three significant digits."""
    known = finite(value)
    if known is None:
        return number(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(known) < 1000:
            return f"{known:.3g} {unit}"
        known /= 1024
    return f"{known:.3g} TiB" if known < 1000 else f"{known:,.0f} TiB"


def plain(value: Any) -> str:
    """A configuration value as text: a string as it is, everything else as JSON."""
    if value is None:
        return MISSING
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def definition_table(pairs: Iterable[tuple[str, str]]) -> str:
    """A two-column table of names and values (both plain text); a value in backquotes becomes code."""
    rows = []
    for name, value in pairs:
        quoted = len(value) > 1 and value[0] == value[-1] == "`"
        cell = f"<code>{escape(value[1:-1])}</code>" if quoted else escape(value)
        rows.append(f'<tr><th scope="row">{escape(name)}</th><td>{cell}</td></tr>')
    return f'<table class="definitions"><tbody>{"".join(rows)}</tbody></table>' if rows else '<p class="quiet">none</p>'


def table(columns: Sequence[str], rows: Iterable[str | Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A table of HTML cells (see `escape`); the columns in `numeric` are right-aligned.

    A row that is a string is a complete `<tr>`.
    """

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="n">{cell}</{tag}>' if index in numeric else f"<{tag}>{cell}</{tag}>"
            for index, cell in enumerate(row)
        )

    head = cells("th", [escape(column) for column in columns])
    body = "".join(row if isinstance(row, str) else f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def stat_cards(values: Iterable[tuple[str, str, str]]) -> str:
    """Cards with the main numbers: (name, value, small print) each, plain text."""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd>{escape(small)}</dd></div>"
        for name, value, small in values
    )
    return f'<dl class="cards">{items}</dl>'


def section(title: str, *content: str, intro: str = "") -> str:
    """A section with a heading; `title` and `intro` are plain text, `content` is HTML."""
    lead = f'<p class="quiet">{escape(intro)}</p>' if intro else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{''.join(content)}</section>"


def environment_section(
    versions: Mapping[str, Any], hardware: Mapping[str, Any], more: Iterable[tuple[str, str]]
) -> str:
    """Versions and hardware side by side, followed by what else is needed to repeat the run."""
    left = definition_table((name, plain(value)) for name, value in versions.items())
    right = definition_table(
        (
            name.removesuffix("_bytes").replace("_", " "),
            size(value) if name.endswith("_bytes") else plain(value),
        )
        for name, value in hardware.items()
    )
    pair = f'<div class="pair"><div><h3>Versions</h3>{left}</div><div><h3>Hardware</h3>{right}</div></div>'
    return section("Environment", pair, definition_table(more))


def document(title: str, header: str, *sections: str) -> str:
    """The complete page: `title` is plain text, `header` and `sections` are HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header>{header}</header>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


# Series colors in the order of the colorblind-safe palette of Okabe and Ito (2008): blue, vermilion, bluish green,
# reddish purple, then two that differ in lightness. Each is adjusted for a contrast of 3 to 1 with the background, and
# all are distinct under protanopia and deuteranopia; tests/test_report.py measures both.
SERIES_LIGHT = ("#0067a8", "#d1560a", "#00916b", "#8a1f7a", "#27313a", "#87939b")
SERIES_DARK = ("#4fa8e8", "#e8743b", "#3fd1a5", "#d23c93", "#f7e08a", "#c3cbe8")
PAPER_LIGHT, PAPER_DARK = "#ffffff", "#14171b"


def _palette(colors: Sequence[str]) -> str:
    return " ".join(f"--s{index}: {color};" for index, color in enumerate(colors))


STYLE = f"""\
:root {{
  --paper: {PAPER_LIGHT}; --ink: #1b2026; --quiet: #5c6670; --rule: #e2e6ea; --soft: #f5f7f8;
  --good: #00714f; --bad: #b3261e; {_palette(SERIES_LIGHT)}
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --paper: {PAPER_DARK}; --ink: #e4e8ec; --quiet: #98a3ae; --rule: #2c323a; --soft: #1c2127;
    --good: #4cc79d; --bad: #ff8a80; {_palette(SERIES_DARK)}
  }}
}}
* {{ box-sizing: border-box; }}
body {{
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%;
}}
main {{ max-width: 1060px; margin: 0 auto; padding: 56px 24px 96px; }}
h1 {{ font-size: 30px; line-height: 1.2; font-weight: 650; letter-spacing: -0.015em; margin: 0 0 6px; }}
h2 {{ font-size: 19px; font-weight: 650; letter-spacing: -0.005em; margin: 0 0 14px; }}
h3 {{ font-size: 13px; font-weight: 600; color: var(--quiet); margin: 0 0 6px; }}
p {{ margin: 0 0 14px; max-width: 46em; }}
section {{ margin-top: 60px; }}
code {{
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere;
}}
.apart {{ margin-top: 28px; }}
.score {{ font-size: 18px; color: var(--quiet); }}
.score strong {{ color: var(--ink); font-weight: 650; }}
.quiet {{ color: var(--quiet); }}
.good {{ color: var(--good); }}
.bad {{ color: var(--bad); font-weight: 600; }}
.note {{ border-left: 3px solid var(--s1); background: var(--soft); padding: 10px 16px; margin: 18px 0 0; }}
.cards {{
  display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 26px 24px;
  margin: 34px 0 0; padding: 22px 0; border: solid var(--rule); border-width: 1px 0;
}}
.cards dt {{ font-size: 13px; color: var(--quiet); }}
.cards dd {{ margin: 0; font-size: 12.5px; color: var(--quiet); line-height: 1.4; }}
.cards dt + dd {{
  font-size: 22px; font-weight: 600; color: var(--ink); line-height: 1.35; white-space: nowrap;
}}
.charts {{
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 36px 44px;
}}
.pair {{
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 24px 44px;
  margin-bottom: 24px;
}}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 14px; }}
th, td {{
  text-align: left; padding: 7px 18px 7px 0; border-bottom: 1px solid var(--rule); vertical-align: top;
}}
th:last-child, td:last-child {{ padding-right: 0; }}
th {{ font-weight: 500; color: var(--quiet); }}
thead th {{ font-size: 13px; vertical-align: bottom; }}
th.n, td.n {{ text-align: right; }}
td.n {{ white-space: nowrap; }}
.definitions th {{ width: 11.5em; white-space: nowrap; }}
.definitions td {{ overflow-wrap: anywhere; }}
.bar {{ display: inline-block; width: 120px; height: 8px; background: var(--soft); vertical-align: 1px; }}
.bar i {{ display: block; height: 100%; background: var(--s0); }}
.images {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(118px, 1fr)); gap: 24px 18px; }}
.images figure {{ margin: 0; break-inside: avoid; }}
.images img {{ display: block; width: 112px; height: 112px; object-fit: contain; background: var(--soft); }}
.images img.small {{ image-rendering: pixelated; }}
.images figcaption {{ font-size: 13px; line-height: 1.4; margin-top: 7px; overflow-wrap: anywhere; }}
.images b {{ font-weight: 600; }}
.reason {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
details {{ margin-top: 14px; }}
summary {{ cursor: pointer; color: var(--quiet); }}
svg.chart {{ display: block; width: 100%; height: auto; overflow: visible; }}
svg.matrix {{ margin: 0 auto; }}
.chart text {{ font-size: 12px; fill: var(--quiet); }}
.chart text.name {{ font-size: 14px; font-weight: 600; fill: var(--ink); }}
.chart text.ink {{ fill: var(--ink); }}
.chart .grid {{ stroke: var(--rule); stroke-width: 1; fill: none; shape-rendering: crispEdges; }}
.chart .axis {{ stroke: var(--quiet); stroke-width: 1; fill: none; shape-rendering: crispEdges; }}
.chart .line {{ fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: butt; }}
.chart .spot {{ stroke: none; }}
.chart .touch {{ fill-opacity: 0; stroke: none; }}
.chart .touch:hover {{ fill-opacity: 0.4; }}
.chart .hit {{ fill: var(--s0); }}
.chart .miss {{ fill: var(--s1); }}
.chart text.on {{ fill: #ffffff; }}
{"".join(f".chart .l{i} {{ stroke: var(--s{i}); }} .chart .f{i} {{ fill: var(--s{i}); }} " for i in range(6))}
@media (prefers-color-scheme: dark) {{ .chart .hit {{ fill: #2878b5; }} .chart .miss {{ fill: #bf5716; }} }}
@media (max-width: 620px) {{ main {{ padding-top: 28px; }} h1 {{ font-size: 25px; }} }}
@media print {{
  main {{ max-width: none; padding: 0; }}
  section {{ margin-top: 32px; }}
  svg {{ break-inside: avoid; }}
}}
"""
