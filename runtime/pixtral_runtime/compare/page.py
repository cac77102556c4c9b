"""One page from a `BundleComparison`: figures, bars and both answers of each case, in a file that loads nothing else.

The bars are inline SVG, the style is inline CSS; there are no scripts. All text that comes from outside (paths,
prompts, answers) is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence

from pixtral_runtime.compare.result import NEAR_TIE_NATS, BundleComparison, CaseDifference, Side, db_text, speed_text
from pixtral_runtime.html_page import CLOSING, Cell, escaped, note, opening, table

BAR_PX, ROW_PX = 420, 22  # the longest bar, and a row of a chart

Bar = tuple[float | None, str, str]
"""Length (None: endless, drawn as long as the longest), what to write beside it, CSS class."""

COMPARE_STYLE = """svg text { font: 12px system-ui, sans-serif; fill: var(--ink); } svg .key { fill: var(--mark); }
svg .value { fill: var(--mark2); } .swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; }
"""


def compare_page(report: BundleComparison) -> str:
    """The whole HTML document."""
    reference, candidate = report.reference, report.candidate
    settings = ", ".join(f"{name} {'-' if value is None else value}" for name, value in report.settings.items())
    parts = [
        opening(f"{candidate.bundle} against {reference.bundle}", style=COMPARE_STYLE),
        note(
            f"{candidate.precision} against {reference.precision}, the reference, over {len(report.cases)} cases. "
            f"{settings}."
        ),
        "<h2>Logits</h2>",
        note(
            "Both bundles read the reference's answers, or your texts, and predict each token. KL is that of the "
            "candidate from the reference. A near-tie is a disagreement where the reference's two best tokens are less "
            f"than {NEAR_TIE_NATS} nats apart."
        ),
        _logits_table(report),
        "<h2>KL of each case</h2>",
        note("Mean over the tokens of the answer or the text in nats; the numbers are those of the table of cases."),
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
        _answers_note(report),
        table(
            ("#", "image or text", "prompt", "KL mean", "KL max", "first diverging token", "reference", "candidate"),
            [_case_row(number, case) for number, case in enumerate(report.cases, start=1)],
        ),
        "<h2>Bundles</h2>",
        note("Speeds are medians over the cases, on the machine that made this page."),
        table(("", "reference", "candidate"), _side_rows(reference, candidate)),
    ]
    if report.skipped:
        rows: list[list[str | Cell]] = [
            [s.image or "-", s.prompt or "all", Cell(s.reason, "text")] for s in report.skipped
        ]
        parts += ["<h2>Skipped</h2>", table(("image", "prompt", "reason"), rows)]
    return "\n".join((*parts, CLOSING))


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
    return table((), [[name, Cell(value, "number")] for name, value in rows])


def _answers_note(report: BundleComparison) -> str:
    if report.answers is None:
        return note("Texts were read, and nothing was answered.")
    return note(
        f"{report.answers.exact_match:.1%} of the free-running answers are the same; the mean similarity of their "
        f"words is {report.answers.similarity_mean:.3f}. Logits prove more: one flipped near-tie changes the rest "
        "of a text."
    )


def _layers_note(report: BundleComparison) -> str:
    worst = report.worst_layer
    said = "Every layer is exact." if worst is None else f"Layer {worst.layer} has the noisiest {worst.tensor}s: "
    said += "" if worst is None else f"{worst.snr_db:.1f} dB."
    if report.images:
        said += f" Image features: {db_text(report.image_features_db)}."
    legend = " ".join(
        f'<span class="swatch" style="background: var({colour})"></span> {name}'
        for colour, name in (("--mark", "keys"), ("--mark2", "values"))
    )
    return f'<p class="note">{escaped(said)} Longer bars are better. {legend}</p>'


def _case_row(number: int, case: CaseDifference) -> list[str | Cell]:
    first = case.first_diverging_token
    return [
        Cell(str(number), "number"),
        Cell(case.image or case.text or "-", "text"),
        Cell(case.prompt, "text"),
        Cell(f"{case.kl_mean_nats:.2e}", "number"),
        Cell(f"{case.kl_max_nats:.2e}", "number"),
        Cell("-" if first is None else str(first), "number"),
        Cell("-" if case.reference_answer is None else case.reference_answer, "text"),
        _answer_cell(case),
    ]


def _answer_cell(case: CaseDifference) -> Cell:
    if case.answer is None:
        return Cell("-", "text")
    return Cell(case.answer, "text") if case.answer != case.reference_answer else Cell("the same", "soft")


def _side_rows(reference: Side, candidate: Side) -> list[list[str | Cell]]:
    def row(name: str, *values: str) -> list[str | Cell]:
        return [name, *(Cell(value, "text") for value in values)]

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
        shapes.append(f'<text x="44" y="{y + 15}" text-anchor="end">{escaped(label)}</text>')
        for length, caption, kind in bars:
            width = BAR_PX if length is None else max(length, 0.0) * scale
            shapes.append(f'<rect class="{kind}" x="52" y="{y + 4}" width="{width:.1f}" height="14" rx="2"/>')
            shapes.append(f'<text x="{58 + width:.1f}" y="{y + 15}">{escaped(caption)}</text>')
            y += ROW_PX
    width_px = BAR_PX + 150
    svg = f'<svg width="{width_px}" height="{y}" viewBox="0 0 {width_px} {y}" role="img">{"".join(shapes)}</svg>'
    return f'<div class="wide">{svg}</div>'
