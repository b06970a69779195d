"""The site builds without a warning: no broken link, no name without a target."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DOCS.is_dir(), reason="the pages are not part of the package"),
]


class Page(HTMLParser):
    """The links and anchors of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors.add(given.get("id"))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif given.get("src") or tag == "link":
            self.links.append(given.get("src") or given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("myst_parser", reason="builds the site (docs extra)")
    pytest.importorskip("furo", reason="builds the site (docs extra)")
    out = tmp_path_factory.mktemp("site")
    line = ["-m", "sphinx", "-q", "-b", "html", "-n", "-W", "--keep-going"]
    done = subprocess.run(
        [sys.executable, *line, "-d", out / "trees", DOCS, out / "html"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYLOSS_REPOSITORY": "https://example.org/it"},
    )
    assert done.returncode == 0, done.stderr
    return out / "html"


def test_links_lead_somewhere(site):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 40
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path.name}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors, f"{path.name}: {link}"


def test_nothing_comes_from_elsewhere(site):
    """The site works offline: its scripts, styles and pictures are its own."""
    for path in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|link)\b[^>]*(?:src|href)=\"([^\"]+)\"", path.read_text()
        )
        assert not [each for each in loaded if urlsplit(each).netloc], path.name


def test_search_finds_names_and_words(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    for word in ("softmax_cross_entropy", "checkpoint", "learning-rate"):
        assert word in index


def test_reference_has_signatures_and_sources(site):
    page = (site / "reference" / "pyloss.html").read_text(encoding="utf-8")
    assert 'id="pyloss.softmax_cross_entropy"' in page and "label_smoothing" in page
    assert "_modules/pyloss/losses/public.html#softmax_cross_entropy" in page
    commands = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    assert 'id="cmdoption-pyloss-train-learning-rate"' in commands


def test_llms_txt_lists_the_pages(site):
    text = (site / "llms.txt").read_text(encoding="utf-8")
    assert text.startswith("# pyloss\n\n> Fine-tune a language model")
    listed = re.findall(r"^- \[(.+)\]\((.+)\): (.+)\.$", text, re.MULTILINE)
    names = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")}
    assert {link for _, link, _ in listed} == {f"{name}.html" for name in names - {"index"}}
