"""``replknet doctor``: what works on this machine, and what to do about the rest."""

from __future__ import annotations

import json
from dataclasses import asdict

from jsonargparse import ArgumentParser, Namespace
from rich.markup import escape

from replknet.analysis.doctor import Finding, examine
from replknet.cli.output import compact_table, output_console

MARKS = {"ok": "ok", "note": "[yellow]note[/yellow]", "problem": "[red]problem[/red]"}


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: Namespace) -> int:
    """Print the findings; 1 if something required does not work."""
    findings = examine()
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        show(findings)
    return int(any(finding.status == "problem" for finding in findings))


def show(findings: list[Finding]) -> None:
    """Print a table, then what to do."""
    table = compact_table("", "subject", "found")
    for finding in findings:
        table.add_row(MARKS[finding.status], escape(finding.subject), escape(finding.value))
    console = output_console()
    console.print(table)
    advised = [finding for finding in findings if finding.advice]
    for finding in advised:
        console.print(
            f"{MARKS[finding.status]} {escape(finding.subject)}: {escape(finding.advice)}"
        )
    if not advised:
        console.print("Nothing to do.")
