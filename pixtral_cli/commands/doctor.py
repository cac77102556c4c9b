"""`pixtral doctor`: what this machine has, what it lacks, and the command that mends it."""

from __future__ import annotations

from dataclasses import asdict

from pixtral_cli import output
from pixtral_cli.options import JsonOption

EPILOG = "Example: pixtral doctor --json"


def doctor(as_json: JsonOption = False) -> None:
    """Show what this machine has, and how to get what it lacks.

    It looks at versions, devices, memory, disk and extras.
    """
    from pixtral_runtime.device.doctor import examine
    from pixtral_runtime.errors import MachineError

    rows = examine()
    broken = [row for row in rows if row.needed and row.status == "missing"]
    if as_json:
        output.print_json({"ready": not broken, "rows": [asdict(row) for row in rows]})
    else:
        output.print_table(("status", "what", "value", "fix"), [(r.status, r.name, r.value, r.fix) for r in rows])
    if broken:
        names = ", ".join(row.name for row in broken)
        raise MachineError(f"pixtral cannot run bundles here, it lacks: {names}", broken[0].fix)
    output.talk("pixtral can run bundles here")
