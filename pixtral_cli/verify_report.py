"""What `pixtral verify` says: each stage with its largest difference, and the verdict."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from pixtral_cli import output

if TYPE_CHECKING:
    from pixtral_runtime.bundle.certificate import Certificate
    from pixtral_runtime.bundle.manifest import Bundle
    from pixtral_runtime.compare.verify import StageCheck


def report_checks(
    bundle: Bundle, certificate: Certificate, checks: list[StageCheck], signature: str, *, as_json: bool
) -> None:
    """Print them. Raises CheckFailed where the last one did not pass."""
    from pixtral_runtime.errors import CheckFailed

    last, missing = checks[-1], certificate.omitted
    verdict = "PASS" if last.passed else "FAIL"
    if as_json:
        stages = [asdict(check) | {"passed": check.passed, "remedies": [*map(str, check.remedies)]} for check in checks]
        about = {
            "agreement": certificate.agreement,
            "headroom": {g: asdict(h) for g, h in certificate.headroom.items()},
        }
        document = {"verdict": verdict, "fingerprint": bundle.fingerprint, "signature": signature, "omitted": missing}
        output.print_json(document | {"stages": stages, "made_with": certificate.tools, **about})
    else:
        rows = [
            (c.stage, f"{c.compared}", f"{c.worst:.1e}", f"{c.tolerance:.0e}", c.case, "ok" if c.passed else "FAILED")
            for c in checks
        ]
        output.print_table(("stage", "compared", "difference", "allowed", "where", ""), rows)
        if signature == "not checked":
            output.talk(f"{bundle.path} is signed; --public-key FILE checks who by")
        if last.passed and missing:
            output.warn(f"the certificate has no tensors, so nothing was computed: {missing}")
        if last.passed:
            output.print_line(f"PASS: {sum(check.compared for check in checks)} comparisons in {len(checks)} stages")
    if not last.passed:
        raise CheckFailed(f"FAIL, {last.stage}: {last.fault}", *last.remedies)
