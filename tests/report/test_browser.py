"""The page in a real browser without a window: it draws, at every width and in both themes.

Skipped where no Chromium is found (Debian: apt-get install chromium-headless-shell).
"""

import json
import re
import shutil
import subprocess
from dataclasses import asdict

import pytest
import torch

from quantpage.evaluate.heads import LayerKeys
from quantpage.report import heads
from quantpage.report.page import render
from quantpage.report.verdict import judge
from tests.report.samples import report

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed"),
]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
    "--virtual-time-budget=4000",
)  # fmt: skip
DARK = "--blink-settings=preferredColorScheme=0"
LIGHT = "--blink-settings=preferredColorScheme=1"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page whose first head has an outlier channel."""
    data = report(layers=12, heads=3)
    plain = torch.rand(3, 8, 16, generator=torch.Generator().manual_seed(1))
    plain[:, :, 5] = 9.0
    layers = [
        LayerKeys(at, plain, plain / 4, plain / 2, at == 0, plain.square().mean(1).sqrt())
        for at in range(12)
    ]
    data["heads"]["pictures"] = heads.as_pictures(layers)
    data["verdict"] = json.loads(json.dumps(asdict(judge(data))))
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(render(data))
    return path


def browse(page, *flags):
    """What the browser says of a page."""
    command = [str(BROWSER), *FLAGS, *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def asked(page, tmp_path, script, *flags):
    """What a script finds out after the page's own has run."""
    ask = (
        "<script>addEventListener('load', () => setTimeout(async () => {"
        f"document.title = JSON.stringify(await (async () => {{{script}}})());"
        "}, 800));</script></body>"
    )
    probe = tmp_path / "probe.html"
    probe.write_text(page.read_text().replace("</body>", ask))
    found = re.search(r"<title>(.*?)</title>", browse(probe, "--dump-dom", *flags), re.S)
    from html import unescape

    return json.loads(unescape(found[1]))


@pytest.mark.parametrize(("theme", "dark"), [(LIGHT, False), (DARK, True)])
@pytest.mark.parametrize("width", [400, 1280])
def test_a_screenshot_shows_the_page(page, tmp_path, width, theme, dark):
    from matplotlib.image import imread

    target = tmp_path / "page.png"
    browse(page, f"--window-size={width},3000", theme, f"--screenshot={target}")
    shot = imread(target)[..., :3]
    assert shot.shape[:2] == (3000, width)
    # The ground is dark or light; marks, cells and text are not.
    ground = shot[2:, :4].mean()
    assert ground < 0.15 if dark else ground > 0.95
    for top in range(0, 3000, 500):
        part = shot[top : top + 500]
        assert part.std() > 0.02, f"nothing is drawn from {top} on"
    # Marks and cells have colours, which text and ground do not.
    assert (shot.max(-1) - shot.min(-1) > 0.25).mean() > 0.002


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_window(page, tmp_path, width):
    widths = asked(
        page, tmp_path,
        "return [document.documentElement.scrollWidth, innerWidth, "
        "Math.min(...[...document.querySelectorAll('figure svg:not(.grid) text')]"
        ".map((each) => each.getBoundingClientRect().height))];",
        f"--window-size={width},1000",
    )  # fmt: skip
    assert widths[0] <= widths[1] == width
    # Text of charts can be read on a telephone.
    assert widths[2] >= 9


def test_a_click_shows_the_keys_of_a_head(page, tmp_path):
    found = asked(
        page, tmp_path,
        """
        const height = document.body.scrollHeight;
        const cell = document.querySelectorAll('svg.grid')[1].querySelectorAll('.cell')[7];
        cell.dispatchEvent(new MouseEvent('click', { bubbles: true }));
        await new Promise((done) => setTimeout(done, 400));
        const canvas = document.querySelector('.keys canvas');
        const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, 1).data;
        return {
          title: document.getElementById('keys-title').textContent,
          said: document.getElementById('keys-said').textContent,
          chosen: document.querySelectorAll('.cell.chosen').length,
          reds: [...Array(canvas.width).keys()].map((at) => pixels[4 * at]),
          moved: document.body.scrollHeight - height,
        };
        """,
        LIGHT,
    )  # fmt: skip
    assert found["title"] == "Keys of layer 2, head 1" and found["chosen"] == 2
    assert re.search(r"5 \(\d+\.\d times\)", found["said"])
    # The outlier channel is the darkest.
    assert min(range(16), key=found["reds"].__getitem__) == 5 and found["moved"] == 0


def test_keys_of_the_keyboard_move_and_another_format_colours(page, tmp_path):
    found = asked(
        page, tmp_path,
        """
        const grid = document.querySelector('svg.grid');
        const cells = grid.querySelectorAll('.cell');
        const press = (key) => document.activeElement.dispatchEvent(
          new KeyboardEvent('keydown', { key, bubbles: true, cancelable: true }));
        cells[0].focus();
        const first = document.getElementById('readout').textContent;
        ['Right', 'Down', 'Left', 'Left', 'Up', 'Right'].forEach((each) => press(`Arrow${each}`));
        press('Enter');
        const at = [...cells].indexOf(document.activeElement);
        const tabs = grid.querySelectorAll('[tabindex="0"]').length;
        report.heads.errors.fp8.keys['1'][0] = 0.5;
        document.querySelector('input[value="fp8"]').click();
        return { first, at, tabs, title: document.getElementById('keys-title').textContent,
                 colour: cells[3].getAttribute('class') };
        """,
    )  # fmt: skip
    assert found["first"] == "layer 0, head 0: keys 1.00 %, values 1.00 %"
    assert found["at"] == 3 and found["tabs"] == 1
    assert found["title"] == "Keys of layer 1, head 0" and found["colour"] == "cell q7 chosen"
