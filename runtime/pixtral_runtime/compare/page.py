"""One page from a `BundleComparison`: figures, bars and both answers of each case, in a file that loads nothing else.

The bars are inline SVG, the style is inline CSS; there are no scripts. All text that comes from outside (paths,
prompts, answers) is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from pixtral_runtime.compare.result import NEAR_TIE_NATS, BundleComparison, CaseDifference, Side, db_text, speed_text

BAR_PX, ROW_PX = 420, 22  # the longest bar, and a row of a chart

Bar = tuple[float | None, str, str]
"""Length (None: endless, drawn as long as the longest), what to write beside it, CSS class."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #667; --line: #d8dce2; --bar: #3b6fb6; --bar2: #c2853a;
        --back: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa3ad; --line: #3a4049; --bar: #6d9fe0; --bar2: #d9a35f; --back: #16191d; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 70rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.note, caption, td.soft { color: var(--soft); } p.note { margin: .3rem 0 .8rem; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; } th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0;
        border-bottom: 1px solid var(--line); }
th { font-weight: 600; } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.text { min-width: 14rem; overflow-wrap: anywhere; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); } svg .key { fill: var(--bar); }
svg .value { fill: var(--bar2); } .swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; }
""".strip()


def compare_page(report: BundleComparison) -> str:
    """The whole HTML document."""
    reference, candidate = report.reference, report.candidate
    settings = ", ".join(f"{name} {'-' if value is None else value}" for name, value in report.settings.items())
    parts = [
        f"<h1>{_text(candidate.bundle)} against {_text(reference.bundle)}</h1>",
        f'<p class="note">{_text(candidate.precision)} against {_text(reference.precision)}, the reference, over '
        f"{len(report.cases)} cases. {_text(settings)}.</p>",
        "<h2>Logits</h2>",
        _note(
            "Both bundles read the reference's answers and predict each token. KL is that of the candidate from the "
            f"reference. A near-tie is a disagreement where the reference's two best tokens are less than "
            f"{NEAR_TIE_NATS} nats apart."
        ),
        _logits_table(report),
        "<h2>KL of each case</h2>",
        _note("Mean over the answer's tokens in nats; the numbers are those of the table of cases."),
        _bars([(str(n), [(c.kl_mean_nats, f"{c.kl_mean_nats:.2e}", "key")]) for n, c in enumerate(report.cases, 1)]),
        "<h2>Signal-to-noise ratio of each layer</h2>",
        _layers_note(report),
        _bars(
            [
                (str(n.layer), [(n.key_db, db_text(n.key_db), "key"), (n.value_db, db_text(n.value_db), "value")])
                for n in report.layers
            ]
        ),
        "<h2>Answers</h2>",
        _note(
            f"{report.answers.exact_match:.1%} of the free-running answers are the same; the mean similarity of their "
            f"words is {report.answers.similarity_mean:.3f}. Logits prove more: one flipped near-tie changes the rest "
            "of a text."
        ),
        _table(
            ("#", "image", "prompt", "KL mean", "KL max", "first diverging token", "reference", "candidate"),
            [_case_row(number, case) for number, case in enumerate(report.cases, start=1)],
        ),
        "<h2>Bundles</h2>",
        _note("Speeds are medians over the cases, on the machine that made this page."),
        _table(("", "reference", "candidate"), _side_rows(reference, candidate)),
    ]
    if report.skipped:
        rows = [[_cell(s.image or "-"), _cell(s.prompt or "all"), _cell(s.reason, "text")] for s in report.skipped]
        parts += ["<h2>Skipped</h2>", _table(("image", "prompt", "reason"), rows)]
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<title>pixtral compare</title>",
            f"<style>\n{STYLE}\n</style></head><body>",
            *parts,
            "</body></html>",
            "",
        )
    )


def _logits_table(report: BundleComparison) -> str:
    logits = report.logits
    rows = [
        ("tokens compared", f"{logits.positions:,}"),
        ("KL mean", f"{logits.kl_mean_nats:.2e} nats"),
        ("KL median", f"{logits.kl_median_nats:.2e} nats"),
        ("KL 95th percentile", f"{logits.kl_p95_nats:.2e} nats"),
        ("KL largest", f"{logits.kl_max_nats:.2e} nats"),
        ("same first choice", f"{logits.top1_agreement:.2%}"),
        ("disagreements", f"{logits.disagreements:,}"),
        ("of them near-ties", f"{logits.near_ties:,}"),
    ]
    return _table((), [[_cell(name), _cell(value, "number")] for name, value in rows])


def _layers_note(report: BundleComparison) -> str:
    worst = report.worst_layer
    text = "Every layer is exact." if worst is None else f"Layer {worst.layer} has the noisiest {worst.tensor}s: "
    text += "" if worst is None else f"{worst.snr_db:.1f} dB."
    if report.images:
        text += f" Image features: {db_text(report.image_features_db)}."
    legend = " ".join(
        f'<span class="swatch" style="background: var({colour})"></span> {name}'
        for colour, name in (("--bar", "keys"), ("--bar2", "values"))
    )
    return f'<p class="note">{_text(text)} Longer bars are better. {legend}</p>'


def _case_row(number: int, case: CaseDifference) -> list[str]:
    first = case.first_diverging_token
    return [
        _cell(str(number), "number"),
        _cell(case.image or "-", "text"),
        _cell(case.prompt, "text"),
        _cell(f"{case.kl_mean_nats:.2e}", "number"),
        _cell(f"{case.kl_max_nats:.2e}", "number"),
        _cell("-" if first is None else str(first), "number"),
        _cell(case.reference_answer, "text"),
        _cell(case.answer, "text") if case.answer != case.reference_answer else _cell("the same", "soft"),
    ]


def _side_rows(reference: Side, candidate: Side) -> list[list[str]]:
    def row(name: str, *values: str) -> list[str]:
        return [_cell(name), *(_cell(value, "text") for value in values)]

    sides = (reference, candidate)
    return [
        row("bundle", *(side.bundle for side in sides)),
        row("fingerprint", *(side.fingerprint for side in sides)),
        row("precision", *(side.precision for side in sides)),
        row("dtype", *(side.dtype for side in sides)),
        row("size", *(f"{side.bundle_bytes:,} bytes" for side in sides)),
        row("load", *(f"{side.load_s:.2f} s" for side in sides)),
        row("prefill", *(speed_text(side.prefill_tokens_per_s) for side in sides)),
        row("decode", *(speed_text(side.decode_tokens_per_s) for side in sides)),
    ]


def _bars(groups: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """A horizontal bar chart. A group is a label and its bars."""
    longest = max((length for _, bars in groups for length, _, _ in bars if length is not None), default=0.0)
    scale = BAR_PX / longest if longest > 0 else 0.0
    shapes: list[str] = []
    y = 0
    for label, bars in groups:
        shapes.append(f'<text x="44" y="{y + 15}" text-anchor="end">{_text(label)}</text>')
        for length, caption, kind in bars:
            width = BAR_PX if length is None else max(length, 0.0) * scale
            shapes.append(f'<rect class="{kind}" x="52" y="{y + 4}" width="{width:.1f}" height="14" rx="2"/>')
            shapes.append(f'<text x="{58 + width:.1f}" y="{y + 15}">{_text(caption)}</text>')
            y += ROW_PX
    width_px = BAR_PX + 150
    svg = f'<svg width="{width_px}" height="{y}" viewBox="0 0 {width_px} {y}" role="img">{"".join(shapes)}</svg>'
    return f'<div class="wide">{svg}</div>'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """`rows` are finished cells, `header` is plain text or empty."""
    head = [[f"<th>{_text(name)}</th>" for name in header]] if header else []
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in (*head, *rows))
    return f'<div class="wide"><table>\n{body}\n</table></div>'


def _cell(text: str, kind: str = "") -> str:
    return f'<td class="{kind}">{_text(text)}</td>' if kind else f"<td>{_text(text)}</td>"


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>'


def _text(text: str) -> str:
    return escape(text, quote=True)
