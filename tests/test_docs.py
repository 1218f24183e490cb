"""The pages: every link leads somewhere, every file that they name is there, the reference is the command's."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
import reference
from conftest import ROOT

PAGES = sorted(
    path
    for pattern in ("*.md", ".github/*.md", "recipes/**/*.md", "tests/**/*.md", "third_party_patches/**/*.md")
    for path in ROOT.glob(pattern)
)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# A path of this repository in running text or in a command. What the commands themselves write is elsewhere.
NAMED = re.compile(r"(?<![\w./-])((?:\.\./)*(?:recipes|tests|mm4ke_plugins|third_party_patches)/[\w./*-]*)")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for line in FENCE.sub("", page.read_text(encoding="utf-8")).splitlines():
        if heading := re.match(r"#{1,6} +(.*)", line):
            words = re.sub(r"[^\w\- ]", "", heading[1].strip().lower()).replace(" ", "-")
            again = sum(
                anchor == words or re.fullmatch(rf"{re.escape(words)}-\d+", anchor) is not None for anchor in found
            )
            found.add(f"{words}-{again}" if again else words)
    return found


def test_anchors_are_those_of_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# The `a_b` key: what's *it*?\n```\n# no heading\n```\n## Twice\n\n## Twice\n", encoding="utf-8")
    assert anchors(page) == {"the-a_b-key-whats-it", "twice", "twice-1"}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page):
    broken = []
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = unquote(target).partition("#")
        file = (page.parent / place).resolve() if place else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_that_is_named_is_there(page):
    named = {path.rstrip(".") for path in NAMED.findall(page.read_text(encoding="utf-8"))}
    # A command in a folder of its own names them from there.
    missing = [path for path in named if not any(ROOT.glob(path.lstrip("./").rstrip("/")))]
    assert not missing


def test_the_readme_can_be_skimmed():
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= 150


def test_the_reference_is_what_the_command_says():
    written = reference.PAGE.read_text(encoding="utf-8")
    assert written == reference.text(), "the help has changed: run `make docs`"
