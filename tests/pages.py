"""What the tests of pages and configurations share: sections of a page, and the labelled lines a configuration opens with."""

from __future__ import annotations

import re
from pathlib import Path


def anchor_of(title: str) -> str:
    """What a heading is called in links, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()).replace(" ", "-")


def section(page: Path, anchor: str) -> str:
    """A section of a page, to the next heading of its level or a higher one.

    Raises:
        AssertionError: the page has no such heading.
    """
    taken: list[str] = []
    level, in_code = 0, False
    for line in page.read_text(encoding="utf-8").splitlines():
        in_code ^= line.startswith("```")
        heading = None if in_code else re.fullmatch(r"(#+) (.+)", line)
        if heading and level and len(heading[1]) <= level:
            break
        if heading and not level and anchor_of(heading[2]) == anchor:
            level = len(heading[1])
        if level:
            taken.append(line)
    assert taken, f"{page.name} has no heading #{anchor}"
    return "\n".join(taken)


def one_line(text: str) -> str:
    """The text without its line breaks and emphasis, so that a sentence is found wherever it is broken."""
    return " ".join(text.replace("**", "").split())


def header(path: Path) -> list[str]:
    """The comment lines that a configuration begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[: next(n for n, line in enumerate(lines) if not line.startswith("#"))]


def labels_of(path: Path) -> dict[str, str]:
    """What stands under each label, in the file's order.

    Raises:
        AssertionError: a line is neither a label's nor goes on with one, or a label is there twice.
    """
    labels: dict[str, list[str]] = {}
    for line in header(path):
        opened = re.fullmatch(r"# ([A-Z]+): (\S.*)", line)
        if opened:
            assert opened[1] not in labels, f"{opened[1]} twice"
            labels[opened[1]] = [opened[2]]
        else:
            assert labels and re.fullmatch(r"#   \S.*", line), f"neither a label nor the rest of one: {line}"
            labels[list(labels)[-1]].append(line[4:])
    return {label: ("\n" if label == "RUN" else " ").join(lines) for label, lines in labels.items()}


def section_of_pool(path: Path) -> str:
    """The section of the page on pools that a pool's EXPECT points at."""
    (anchor,) = re.findall(r"docs/pools\.md#([\w-]+)", labels_of(path)["EXPECT"])
    return section(path.parents[2] / "docs" / "pools.md", anchor)
