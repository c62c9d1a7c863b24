"""The supervisor's protection from the kernel's out-of-memory killer, which zygote and keepers inherit.

Leaves out: making sandboxes better victims (sandbox/bridge.py raises its own value before it runs agent code).

Sources: proc_pid_oom_score_adj(5), capabilities(7).
"""

from __future__ import annotations

from pathlib import Path

PROTECTED = -500
_OWN = Path("/proc/self/oom_score_adj")


def protect() -> bool:
    """Makes this process and those it will start unlikely victims; False where the host doesn't let us.

    Lowering takes CAP_SYS_RESOURCE; a service manager may have done it already (systemd: OOMScoreAdjust=-500).
    """
    try:
        if int(_OWN.read_text()) > PROTECTED:
            _OWN.write_text(str(PROTECTED))
    except (OSError, ValueError):
        return False
    return True
