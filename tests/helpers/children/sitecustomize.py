"""Python reads this first where PYTHONPATH names its folder: exports of a child process share the traces of the run."""

from __future__ import annotations

import sys

if "pixtral_cli" in sys.orig_argv:
    from helpers.traces import share_traces

    share_traces()
