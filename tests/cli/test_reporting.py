"""`pyloss report`: the page of a real run of a tiny model, its parts and how a browser shows it."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tiny_project
from PIL import Image
from tiny_commands import fails

from pyloss.cli import main

TRAIN = [*tiny_project.TRAIN, "--iters", "6", "--steps-per-report", "1", "--learning-rate", "1e-2"]
REPORT = ["report", "run", "--prompts", "2", "--max-tokens", "4"]
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    tiny_project.make(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*TRAIN, "--adapter-path", "run", "--mask-prompt"]) == 0
        assert main(REPORT) == 0
    return folder


@pytest.fixture
def project(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects ids, headings, tags and attributes."""

    EMPTY = ("meta", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def sections(self):
        return [value for name, value in self.attributes if name == "id"]


def test_the_page_has_every_part_and_nothing_from_elsewhere(project):
    text = (project / "run" / "report.html").read_text()
    page = Page(text)
    assert page.sections() == [
        *("curves", "metrics", "answers", "layers", "data", "settings", "machine"),
    ]
    assert page.tags.count("svg") == 5 and "script" not in page.tags and "img" not in page.tags
    places = [value for name, value in page.attributes if name in ("src", "href")]
    assert (
        all(place.startswith(("#", "data:")) for place in places)
        and "http:" not in text
        and "https:" not in text
    )
    assert not re.search(r"url\(|@import", text)
    said = " ".join(page.words)
    for part in (
        "lora over base; 6 iterations",
        "self_attn.q_proj",
        "records: 6",
        "mask_prompt",
        "hello 0",
        "exact-match",
        "perplexity",
        "95 % interval",
        "train_on last",
    ):
        assert part in said, part
    assert page.tags.count("details") == 2 and str(project) not in text


def test_no_answers_and_another_file(project, capsys):
    assert main([*REPORT, "--no-answers", "--output", "page.html"]) == 0
    assert "wrote page.html" in capsys.readouterr().err
    page = Page(Path("page.html").read_text())
    assert "answers" not in page.sections() and {"metrics", "layers"} <= set(page.sections())
    assert main([*REPORT, "--no-answers", "--output", "page.html"]) == 0
    assert Path("previous-1/page.html").is_file()


def test_an_adapter_without_curves_or_a_run(project, capsys):
    assert main(["report", "adapters", "--model", "base", "--output", "a.html"]) == 0
    page = Page(Path("a.html").read_text())
    assert page.sections() == ["layers", "settings", "machine"]
    said = " ".join(page.words)
    assert "no metrics.jsonl" in said and "give --data: no data given" in said


def test_a_model_that_lies_elsewhere_now(project, capsys, tmp_path):
    shutil.copytree("run", tmp_path / "run")
    config = tmp_path / "run" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model": "gone"}))
    argv = ["report", str(tmp_path / "run"), "--no-answers", "--overwrite"]
    assert main(argv) == 0
    assert "give --model: no model at 'gone'" in capsys.readouterr().err
    assert Page((tmp_path / "run" / "report.html").read_text()).sections()[0] == "curves"
    assert main([*argv, "--model", "base"]) == 0
    assert "give --model" not in capsys.readouterr().err
    fails(capsys, [*argv, "--model", "gone"], "no model at 'gone'")


def test_full_fine_tuning_loads_the_base(project, capsys):
    flags = ["--fine-tune-type", "full", "--full-keys", "mlp", "--adapter-path", "full"]
    assert main([*TRAIN, *flags]) == 0
    assert main(["report", "full", "--prompts", "1", "--max-tokens", "2"]) == 0
    text = Path("full/report.html").read_text()
    assert "full over base" in text and "mlp.up_proj" in text


def test_wrong_calls_are_one_line(project, capsys):
    fails(capsys, ["report", "none"], "no adapter in none")
    fails(capsys, ["report", "data"], "no adapter in data: it has no adapter_config.json")
    fails(capsys, [*REPORT, "--output", "x.pdf"], "--output x.pdf: give the name of an .html file")
    fails(capsys, ["report", "run", "--prompts", "0"], "--prompts is 0")


FRAME = """<!doctype html><body style="margin:0"><iframe id="f"
style="width:{width}px;height:900px;border:0"
srcdoc="{page}"></iframe><p id="said"></p><script>
f.onload = () => {{
  const root = f.contentDocument.documentElement;
  const svg = f.contentDocument.querySelector("svg").getBoundingClientRect();
  const shown = [...f.contentDocument.querySelectorAll("section")].filter(s => s.offsetHeight > 20);
  said.textContent = [root.scrollWidth - root.clientWidth, Math.round(svg.left),
    Math.round(svg.top), Math.round(svg.width), Math.round(svg.height), shown.length].join(" ");
}};
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_the_page_at_two_widths(project, tmp_path, width):
    page = (project / "run" / "report.html").read_text()
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width, page=html.escape(page)))
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,1000"),
            *("--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--virtual-time-budget=5000", f"--screenshot={tmp_path / 'page.png'}"),
            *("--dump-dom", frame.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<p id="said">([\d ]+)</p>', done.stdout)
    assert found, done.stderr[-2000:]
    across, left, top, wide, high, sections = map(int, found[1].split())
    assert not across and sections == 7
    assert 200 < wide <= width and high > 100
    assert "CONSOLE" not in done.stderr, done.stderr
    screen = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert (screen[:, width:] == 255).all() and not (screen[:, :width] == 255).all()
    color = re.search(r"--s0: #(\w{6})", page)[1]
    chart = screen[top : top + high, left : left + wide]
    assert (chart == list(bytes.fromhex(color))).all(axis=2).sum() > 20  # a curve is drawn


def test_data_that_lie_elsewhere_are_not_looked_for_on_the_hub(project, capsys, tmp_path):
    shutil.copytree("run", tmp_path / "run")
    config = tmp_path / "run" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"data": "gone"}))
    assert main(["report", str(tmp_path / "run"), "--overwrite"]) == 0
    assert "there is no 'gone' here; give --data" in capsys.readouterr().err


def test_a_report_goes_with_its_run(tmp_path, monkeypatch):
    tiny_project.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main([*tiny_project.TRAIN, "--adapter-path", "run"]) == 0
    assert main(["report", "run", "--no-answers"]) == 0
    page = (tmp_path / "run" / "report.html").read_bytes()
    assert main([*tiny_project.TRAIN, "--adapter-path", "run"]) == 0
    assert not (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "previous-1" / "report.html").read_bytes() == page
