"""What ramps found, for people: tables, the picture, and the generated part of docs/capacity.md.

Covers: turning a report (the JSON) into text and a PNG, and the arithmetic from measured numbers to another machine.
Leaves out: measuring (ramp.py). Everything here is made from the report alone, so that it can be made again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ramp import MIB, named

GIB = 1024 * MIB
SHOWN_STEPS = 12
BEGIN, END = "<!-- measured: begin {source} -->", "<!-- measured: end -->"
_BLOCK = re.compile(r"<!-- measured: begin (\S+) -->\n.*?<!-- measured: end -->", re.DOTALL)

AGENTS = {
    "idle": "idle Python",
    "heap64": "64 MiB heap",
    "heap256": "256 MiB heap",
    "subprocess": "own Python process with 64 MiB",
}
REASONS = {
    "unavailable": "server unavailable",
    "failing": "every create failed",
    "sessions": "as many as asked for",
    "minutes": "time was over",
    "available": "host nearly full",
    "interrupted": "interrupted",
}
BOUNDS = {"memory": "memory_headroom", "memory pressure": "memory_pressure"}
"""What a runner refuses for, by the setting its refusal names; else it is the number of slots."""
LAST_ASKED = "(the last runner asked: "


# ---------------------------------------------------------------- tables


def table(rows: Sequence[Sequence[str]], *, texts: int = 1) -> list[str]:
    """Markdown; the first row is the head, the first `texts` columns are text, the others numbers."""
    head, *body = rows
    rule = "|" + "---|" * texts + "---:|" * (len(head) - texts)
    return [_line(head), rule, *(_line(row) for row in body)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def mib(size: float | None, digits: int = 1) -> str:
    return "–" if size is None else f"{size / MIB:.{digits}f}"


def reason(run: dict[str, Any]) -> str:
    """Why it stopped, with the server's words."""
    detail = shortened(run["stop"]["detail"])
    return ended_by(run) + (f": {detail}" if detail else "")


def ended_by(run: dict[str, Any]) -> str:
    """Why it stopped, in a word or two."""
    stop = run["stop"]
    if stop["reason"] == "refused":
        bound = next((name for name, setting in BOUNDS.items() if setting in stop["detail"]), "slots")
        return f"refused ({bound})"
    return REASONS[stop["reason"]]


def shortened(detail: str, most: int = 110) -> str:
    """The server's words without method and path, the last runner's own if it quotes them; safe in a table."""
    text = re.sub(r"^[A-Z]+ \S+: (\d{3} )?", "", " ".join(detail.split())).replace("|", "/")
    text = text.rpartition(LAST_ASKED)[2].removesuffix(")") if LAST_ASKED in text else text
    return text if len(text) <= most else text[: most - 1] + "…"


SUMMARY_HEAD = (
    "limit", "agent", "sandboxes", "MiB gone", "MiB each", "of it PSS", "platform", "kernel", "gone each",
    "create p50 ms", "p95 ms", "CPU idle %", "active at the end", "failures", "left", "stopped by",
)  # fmt: skip


def summary_row(run: dict[str, Any]) -> list[str]:
    each, create = run["per_sandbox_bytes"] or {}, run["create_ms"]
    steps = run["steps"] or [{"lost_bytes": None}]
    return [
        named(run["memory_limit_mb"]),
        AGENTS[run["agent"]],
        str(run["sessions"]),
        mib(steps[-1]["lost_bytes"] if each else None, 0),
        *(mib(each.get(kind)) for kind in ("counted_bytes", "sandboxes_pss_bytes")),
        *(mib(each.get(kind), 2) for kind in ("platform_growth_bytes", "kernel_growth_bytes")),
        mib(each.get("lost_bytes")),
        *(f"{create[point]:.0f}" if create else "–" for point in ("p50", "p95")),
        f"{sum(run['idle_cpu_percent'].values()):.1f}" if run["idle_cpu_percent"] else "–",
        str(run["active_at_end"]),
        ", ".join(f"{count} × {what}" for what, count in run["failures"].items()) or "0",
        str(len(run["left"])),
        reason(run),
    ]


def summary(runs: Sequence[dict[str, Any]]) -> list[str]:
    lines = table([SUMMARY_HEAD, *(summary_row(run) for run in runs)], texts=2)
    rule = lines[1].removesuffix("---:|") + "---|"
    return [lines[0], rule, *lines[2:]]


STEP_HEAD = (
    "sandboxes",
    "processes",
    "MiB gone",
    "MiB left",
    "PSS MiB",
    "platform MiB",
    "kernel MiB",
    "p50 ms",
    "p95 ms",
)


def step_rows(run: dict[str, Any]) -> Iterator[list[str]]:
    for step in _some(run["steps"], SHOWN_STEPS):
        create = step["create_ms"]
        yield [
            str(step["sandboxes"]),
            str(step["processes"]),
            *(mib(step[f"{kind}_bytes"], 0) for kind in ("lost", "available", "sandboxes_pss")),
            *(mib(step[f"{kind}_bytes"]) for kind in ("platform_growth", "kernel_growth")),
            *(f"{create[point]:.0f}" if create else "–" for point in ("p50", "p95")),
        ]


def _some(steps: Sequence[Any], most: int) -> list[Any]:
    """At most so many, evenly picked, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(number * (len(steps) - 1) / (most - 1))] for number in range(most)]


def page(report: dict[str, Any], stem: str, *, picture: bool) -> str:
    """The measurement as Markdown."""
    lines = [
        f"# Memory ceiling, {report['at'][:10]}",
        "",
        "Written by `loadtest/memory_ceiling.py`; what each column means: loadtest/README.md.",
        f"All numbers: [{stem}.json]({stem}.json).",
        "",
        f"* machine: {report['machine']}",
        f"* commit: {report['commit']}",
        f"* server: ashd {report['version']}",
        f"* command: `{report['command']}`",
    ]
    lines += [f"* {note}" for note in report["notes"]]
    lines += ["", *summary(report["runs"])]
    if picture:
        lines += ["", f"![sandboxes against memory, and the latency of creating them]({stem}.png)"]
    for run in report["runs"]:
        lines += ["", f"## Limit {named(run['memory_limit_mb'])}, {AGENTS[run['agent']]}", ""]
        lines += [f"Stopped: {reason(run)}.", ""]
        lines += table([STEP_HEAD, *step_rows(run)], texts=0)
        lines += [f"* left behind: {what}" for what in run["left"]]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- the picture


class NoLibrary(Exception):
    """matplotlib is not installed."""


_COLOURS = {512: "#1f77b4", 256: "#2ca02c", 128: "#ff7f0e", None: "#7f7f7f"}
_MEMORY = (
    ("lost_bytes", "-", "gone of the host's memory"),
    ("sandboxes_pss_bytes", "--", "PSS of the sandboxes"),
    ("kernel_growth_bytes", ":", "kernel's own"),
)
_LATENCY = (("p50", "-"), ("p95", "--"))


def draw(report: dict[str, Any], path: Path) -> None:
    """A column an agent: memory above, the latency of creates below; a colour a limit. Raises NoLibrary."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise NoLibrary("it needs matplotlib: pip install 'matplotlib>=3.10,<4', then --from") from None
    runs = [run for run in report["runs"] if len(run["steps"]) > 1]
    kinds = [kind for kind in AGENTS if any(run["agent"] == kind for run in runs)] or ["idle"]
    figure = Figure(figsize=(max(5.2 * len(kinds), 8), 8.4), layout="constrained")
    for column, axes in enumerate(zip(*figure.subplots(2, len(kinds), squeeze=False, sharex="col"), strict=True)):
        mine = [run for run in runs if run["agent"] == kinds[column]]
        _draw_agent(mine, AGENTS[kinds[column]], *axes)
    figure.suptitle(f"Sandboxes against memory, {report['at'][:10]}\n{report['machine']}", fontsize="medium")
    figure.savefig(path, dpi=90, metadata={"Software": None})


def _draw_agent(runs: Sequence[dict[str, Any]], title: str, memory: Any, latency: Any) -> None:
    for run in runs:
        _draw_run(run, memory, latency)
    for style, what in [line[1:] for line in _MEMORY]:
        memory.plot([], [], style, color="black", label=what)
    for point, style in _LATENCY:
        latency.plot([], [], style, color="black", label=point)
    memory.set_title(title)
    memory.set_ylabel("GiB")
    latency.set_ylabel("create, ms")
    latency.set_xlabel("sandboxes")
    for axis in (memory, latency):
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="upper left")


def _draw_run(run: dict[str, Any], memory: Any, latency: Any) -> None:
    steps, colour = run["steps"], _COLOURS.get(run["memory_limit_mb"], "#9467bd")
    counts = [step["sandboxes"] or step["sessions"] for step in steps]
    for kind, style, _ in _MEMORY:
        memory.plot(counts, [step[kind] / GIB for step in steps], style, color=colour)
    timed = [(count, step["create_ms"]) for count, step in zip(counts, steps, strict=True) if step["create_ms"]]
    for point, style in _LATENCY:
        latency.plot([count for count, _ in timed], [create[point] for _, create in timed], style, color=colour)
    end = f"limit {named(run['memory_limit_mb'])}: {counts[-1]}, {ended_by(run)}"
    top = steps[-1]["lost_bytes"] / GIB
    memory.plot(counts[-1], top, "X", color=colour, markersize=9, markeredgecolor="black", label=end)
    latency.axvline(counts[-1], color=colour, linewidth=0.8, linestyle="-.")


# ---------------------------------------------------------------- another machine


@dataclass(frozen=True)
class Machine:
    """The one the plan's estimates are for."""

    name: str = "8 vCPU, 16 GiB"
    memory: int = 16 * GIB
    system: int = 512 * MIB
    """Assumed for everything that is not ashd."""
    headroom: int = 512 * MIB
    """memory_headroom's default."""
    sandboxes: int = 1000
    """max_sandboxes' default."""
    estimates: tuple[tuple[int | None, str], ...] = ((512, "30"), (256, "60"), (128, "120"), (None, "50–200"))

    def room(self, platform: int) -> int:
        """Bytes for sandboxes."""
        return self.memory - self.system - self.headroom - platform


def fits(room: int, each: float | None) -> int | None:
    """How many sandboxes of that cost."""
    return None if not each or each <= 0 else math.floor(room / each)


def scaled(machine: Machine, run: dict[str, Any] | None) -> str:
    """What a run says about that machine."""
    if run is None:
        return "not measured"
    if run["stop"]["reason"] == "failing":
        return "does not fit"
    count = fits(machine.room(run["platform_pss_bytes"]), (run["per_sandbox_bytes"] or {}).get("counted_bytes"))
    if count is None:
        return "–"
    return f"{machine.sandboxes} ({count})" if count > machine.sandboxes else str(count)


def capacity_block(report: dict[str, Any], source: str, machine: Machine | None = None) -> str:
    """The generated part of docs/capacity.md, its markers included."""
    machine = machine or Machine()
    runs = {(run["memory_limit_mb"], run["agent"]): run for run in report["runs"]}
    platform = max((run["platform_pss_bytes"] for run in report["runs"]), default=0)
    head = ["limit", "the plan's estimate", "every sandbox full", *AGENTS.values()]
    scaled_rows, each_rows, seen_rows = [head], [["limit", *AGENTS.values()]], [["limit", *AGENTS.values()]]
    for limit, estimate in machine.estimates:
        of = [runs.get((limit, agent)) for agent in AGENTS]
        full = fits(machine.room(platform), limit * MIB) if limit else None
        scaled_rows.append([named(limit), estimate, str(full or "–"), *(scaled(machine, run) for run in of)])
        each_rows.append([named(limit), *(_cell(run, _each) for run in of)])
        seen_rows.append([named(limit), *(_cell(run, _seen) for run in of)])
    lines = [
        BEGIN.format(source=source),
        f"Measured {report['at'][:10]} on {report['machine']}, commit {report['commit']}, by",
        f"`{report['command']}`.",
        *(f"{note}." for note in report["notes"]),
        "",
        f"Sandboxes on {machine.name}, from what one costs on the measured machine. Room for them there: 16 GiB, less",
        f"{mib(machine.system, 0)} MiB for the system (assumed), {mib(machine.headroom, 0)} MiB `memory_headroom`, and",
        f"the {mib(platform, 0)} MiB that coordinator, runner and database had before the first sandbox:",
        f"{mib(machine.room(platform), 0)} MiB. Where `max_sandboxes` ends it first, what memory holds is in brackets.",
        "",
        *table(scaled_rows),
        "",
        "What one more sandbox cost there, MiB: PSS of its processes, and what platform and kernel grew by. In",
        "brackets what the whole machine had less of, by MemAvailable; what others did meanwhile is in that number.",
        "",
        *table(each_rows),
        "",
        "How many there were on the measured machine, and what ended the ramp:",
        "",
        *table(seen_rows),
        END,
    ]
    return "\n".join(lines)


def _cell(run: dict[str, Any] | None, text: Callable[[dict[str, Any]], str]) -> str:
    return "not measured" if run is None else text(run)


def _each(run: dict[str, Any]) -> str:
    each = run["per_sandbox_bytes"]
    return "–" if each is None else f"{mib(each['counted_bytes'])} ({mib(each['lost_bytes'])})"


def _seen(run: dict[str, Any]) -> str:
    return f"{run['sessions']}, {ended_by(run)}"


def with_block(text: str, block: str) -> str:
    """The page with its generated part replaced. Raises ValueError when it has none."""
    if len(_BLOCK.findall(text)) != 1:
        raise ValueError(f"the page needs the lines {BEGIN.format(source='FILE')} and {END}, once")
    return _BLOCK.sub(lambda _: block, text)


def block_of(text: str) -> tuple[str, str]:
    """A page's generated part, and the name of the report it was made from. Raises ValueError when it has none."""
    if (found := _BLOCK.search(text)) is None:
        raise ValueError("the page has no generated part")
    return found[0], found[1]
