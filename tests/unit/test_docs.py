"""What README and docs/ point at is there, and every page is pointed at from somewhere."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """(file, anchor) of every relative link; the anchor is '' where there is none."""
    for target in LINK.findall(page.read_text()):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


def anchors(page: Path) -> set[str]:
    """The anchors that its headings get: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_leads_to_a_file_and_a_heading_of_it(page):
    for target, anchor in links(page):
        assert target.exists(), f"{name(page)} points at {target}"
        assert not anchor or anchor in anchors(target), f"{name(page)} points at #{anchor} of {name(target)}"


def test_every_page_is_reached_from_the_readme():
    reached, new = set(), {ROOT / "README.md"}
    while new:
        reached |= new
        new = {target for page in new for target, _ in links(page) if target.suffix == ".md"} - reached
    assert not [name(page) for page in PAGES if page not in reached]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_of_this_repository_that_a_page_names_is_there(page):
    # build/ is made by `make`.
    for path in re.findall(r"`((?:bench|bpf|deploy|docs|src|tests)/[\w./-]*)`", page.read_text()):
        assert (ROOT / path).exists(), f"{name(page)} names {path}"


def test_every_target_of_make_that_a_page_names_is_one():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(), re.MULTILINE)) <= targets, name(page)
