"""What the documentation names is there."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from replknet.cli.main import COMMANDS, build_parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`]*`", "", page.read_text())
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_exist(page):
    for name in re.findall(
        r"`((?:csrc|src|docs|tests|benchmarks|examples|recipes)/[\w./]+)`", page.read_text()
    ):
        assert (ROOT / name).exists(), name


def commands() -> list[tuple[str, str]]:
    """Command lines of the documentation: the subcommand, and what follows."""
    found = set()
    for page in PAGES:
        blocks = re.findall(r"```\w*\n(.*?)```", page.read_text(), flags=re.DOTALL)
        lines = [line for block in blocks for line in block.splitlines()]
        lines += re.findall(r"`([^`\n]+)`", page.read_text())
        for line in lines:
            match = re.match(r"(?:torchrun .* )?replknet (\w+)\b(.*)", line.partition(" #")[0])
            if match and match[1] in COMMANDS and "..." not in match[2]:
                found.add((match[1], match[2].strip()))
    return sorted(found)


@pytest.mark.parametrize(("command", "rest"), commands())
def test_options_exist(command, rest):
    with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit):
        build_parser(command).parse_args(["--help"])
    known = shown.getvalue()
    words = shlex.split(rest)
    if command == "benchmark" and words and not words[0].startswith("-"):
        with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit):
            build_parser(command).parse_args([words[0].strip(","), "--help"])
        known += shown.getvalue()
    for word in words:
        if word.startswith("--"):
            assert re.search(rf"{re.escape(word)}\b", known), word
