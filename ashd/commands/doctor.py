"""`ashd doctor`: what this host's jail is worth, and what the host lacks. Needs no server."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ashd.commands import host, parsers
from ashd.commands.exits import Exit
from ashd.commands.output import print_json, print_table
from ashd.domain.isolation import reaches

if TYPE_CHECKING:
    from ashd.config.schema import RunnerConfig
    from ashd.runner.selftest import Report


def register(commands: parsers.Commands[argparse.ArgumentParser]) -> None:
    doctor = parsers.add(
        commands,
        "doctor",
        run_doctor,
        summary="try on this host what a sandbox must not do; say what it lacks, and how to get it",
        example="ashd doctor -c conf/runner.yaml",
        then="run it as the user who is to run the runner, then ashd runner",
    )
    parsers.add_config_option(doctor)
    parsers.add_json_option(doctor)


def run_doctor(args: argparse.Namespace) -> int:
    """FAILED when the host does not reach the configured isolation."""
    from ashd.runner import selftest

    config = _runner_config(args.config)
    report = selftest.examine(dataclasses.replace(config, isolation="auto"))  # what it can, not what is asked of it
    facts = host.facts(config, os.environ)
    suffices = reaches(report.level, config.isolation)
    if args.json:
        print_json(_as_json(report, facts, config.isolation, suffices))
    else:
        _print(report, facts, config.isolation, suffices)
    return Exit.OK if suffices else Exit.FAILED


def _runner_config(path: Path | None) -> RunnerConfig:
    """Of a runner's file, or of the section `runner` in one for `ashd up`."""
    from ashd.config import loader

    if path is not None and "runner" in loader.top_level_keys(path):
        return loader.load_standalone(path, os.environ).config.runner
    return loader.load_runner(path, os.environ).config


def _as_json(report: Report, facts: list[host.Fact], configured: str, suffices: bool) -> dict[str, Any]:
    return {
        "level": report.level,
        "configured": configured,
        "suffices": suffices,
        "enforced": report.enforced,
        "lacking": report.lacking,
        "findings": [dataclasses.asdict(finding) for finding in report.findings],
        "host": [dataclasses.asdict(fact) for fact in facts],
    }


def _print(report: Report, facts: list[host.Fact], configured: str, suffices: bool) -> None:
    tried = [
        {
            "tried in a jail": finding.name,
            "needed for": finding.level,
            "denied": "yes" if finding.denied else "NO",
            "what happened": finding.detail,
        }
        for finding in report.findings
    ]
    print_table(tried, ["tried in a jail", "needed for", "denied", "what happened"], empty="Nothing was tried.")
    print()
    print_table([dataclasses.asdict(fact) for fact in facts], ["name", "value"], empty="")
    print(f"\nenforced: {', '.join(report.enforced) or 'nothing'}")
    remedies = [f"{one.name}: {one.remedy}" for one in report.missed if one.remedy]
    _print_list("this host lacks", report.lacking)
    _print_list("how to get it", [*remedies, *(f"{fact.name}: {fact.advice}" for fact in facts if fact.advice)])
    verdict = "which is enough" if suffices else "which is NOT enough: the runner would not start"
    print(f"\nThis host reaches {report.level}; configured is {configured}, {verdict}.")


def _print_list(title: str, items: list[str]) -> None:
    if items:
        print(f"{title}:", *dict.fromkeys(items), sep="\n  ")
