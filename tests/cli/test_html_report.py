"""The pages of ``dithooks search`` and ``dithooks compare``: whole by themselves, with the right pictures, and shown by
a browser without a word of complaint.
"""

import base64
import io
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from dithooks import CachePlan
from dithooks.cli.html_report import page, strips
from dithooks.cli.main import main

pytest.importorskip("diffusers")

DEMO = ["demo", "--steps", "6", "--prompt", "cat face", "--prompt", "taxi", "--quiet"]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def embedded(html):
    """The pictures of a page, as arrays."""
    data = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in data]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Both, of the pipeline that ships, and the plan."""
    folder = tmp_path_factory.mktemp("pages")
    found, plan, compared = folder / "search.html", folder / "plan.json", folder / "compare.html"
    searched = ["--target", "1.5", "--max-evals", "1", "--cost", "blocks", "--out", str(plan), "--report", str(found)]
    assert main(["search", *DEMO, *searched]) in (0, 3)
    assert main(["compare", *DEMO, "--pairs", "1", "--plan", str(plan), "--out", str(compared)]) == 0
    return found, compared, CachePlan.load(plan)


@pytest.mark.parametrize("which", [0, 1], ids=["search", "compare"])
def test_a_page_is_whole(pages, which):
    """Nothing is fetched; pictures without a cache, with it, and what differs; the steps as they are in the plan."""
    html, plan = pages[which].read_text(encoding="utf-8"), pages[2]
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    pictures = embedded(html)
    assert [each.shape for each in pictures] == [(32, 32, 3)] * 6
    plain, cached, differs = pictures[:2], pictures[2:4], pictures[4:]
    factor = int(re.search(r"(\d+) × the difference", html)[1])
    for a, b, seen in zip(plain, cached, differs, strict=True):
        expected = np.abs(a.astype(int) - b).mean(-1) * factor
        assert np.abs((255 - expected.clip(0, 255)) - seen[..., 0]).max() <= 0.5
    states = re.findall(r"<title>step (\d+): (\w+)</title>", html)[: plan.made.steps]
    assert states == [(str(n), "computed" if bit else "reused") for n, bit in enumerate(plan.pieces[0].steps)]


def test_what_to_paste_runs(pages, monkeypatch):
    html = pages[0].read_text(encoding="utf-8")
    code = re.search(r"<pre>(.*?)</pre>", html, re.S)[1].replace("&#x27;", "'").replace("&quot;", '"')
    from dithooks.demo import load_pipeline

    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    exec(code.replace("pipe(...)", "pipe('taxi', num_inference_steps=6)"), {"pipe": pipe})


def test_what_is_no_picture():
    waves = [np.full((4, 7), 300.0, np.float32)]
    assert "does not look like pictures" in strips(waves, waves, [])
    assert "does not look like pictures" in strips([], [], [])


def test_the_name_of_a_page(capsys):
    assert main(["search", *DEMO, "--report", "page.png"]) == 2
    assert "--report page.png is a page: give a name that ends in .html" in capsys.readouterr().err


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it(pages, width, tmp_path):
    """All pictures are loaded, and the page is no wider than the window."""
    script = (
        "<script>document.title = [innerWidth, document.documentElement.scrollWidth, "
        "[...document.images].filter(each => each.naturalWidth === 32).length].join()</script>"
    )
    for path in pages[:2]:
        (tmp_path / "page.html").write_text(path.read_text(encoding="utf-8").replace("</body>", f"{script}</body>"))
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
        shown = subprocess.run(
            [*command, "--virtual-time-budget=2000", "--dump-dom", (tmp_path / "page.html").as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        inner, wide, pictures = map(int, re.search(r"<title>(\d+),(\d+),(\d+)</title>", shown).groups())
        assert wide <= inner
        assert pictures == 6


def test_texts_are_escaped():
    assert "<title>a &lt; b</title>" in page("a < b", [])
    grey = [np.zeros((3, 2, 2), np.float32)]
    assert "<figcaption>&lt;b&gt;</figcaption>" in strips(grey, grey, ["<b>"])
