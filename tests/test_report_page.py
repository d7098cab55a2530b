"""The HTML report, opened in a real browser: every picture is there and drawn, every run is named, nothing is loaded.

The page runs no scripts; what the browser sees is asked by a script in a copy of it.
"""

from __future__ import annotations

import html
import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from ndem_zoo import plots, runs
from ndem_zoo.errors import ConfigError, FileFormatError
from ndem_zoo.physics import KCAL_PER_MOL
from ndem_zoo.predictions import FILE, MOST_STRUCTURES, Predictions
from ndem_zoo.report import RunSummary, read_run, report_blocks, report_figures, write_report

pytest.importorskip("matplotlib")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTH, HEIGHT = 1100, 4500

#: What a person would see, as numbers: sizes of the pictures, texts, colors, whether something sticks out.
QUESTIONS = """
<script>
const errors = [];
addEventListener("error", event => errors.push(String(event.message)));
addEventListener("load", () => {
  const images = [];
  for (const image of document.images) {
    if (!image.complete) errors.push("not loaded: " + image.alt);
    const box = image.getBoundingClientRect();
    images.push({natural: image.naturalWidth, box: [box.left, box.top, box.right, box.bottom], alt: image.alt,
                 source: image.currentSrc.slice(-60)});
  }
  const color = element => getComputedStyle(element);
  const found = {images, errors, text: document.body.innerText, title: document.title,
    ground: color(document.body).backgroundColor, ink: color(document.body).color,
    dim: color(document.querySelector("figcaption")).color,
    head: [color(document.querySelector("thead th")).backgroundColor, color(document.querySelector("thead th")).color],
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth};
  const answer = document.createElement("script");
  answer.type = "application/json"; answer.id = "answer"; answer.textContent = JSON.stringify(found);
  document.body.append(answer);
});
</script>
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory, ethanol):
    """Two runs of seconds, one with a name that must be escaped."""
    from ndem_zoo import NDeMTorchMDNet

    home = tmp_path_factory.mktemp("runs")
    parts = runs.Splits("sample:ethanol", ethanol[:16], ethanol[100:108], ethanol[200:230], seed=1)
    for name, objective in (("ndem & <co>", "ndem"), ("plain", "supervised")):
        options = {"hidden_channels": 8, "num_layers": 1, "num_heads": 2, "num_rbf": 4}
        model = NDeMTorchMDNet(
            preset="md17_fast", objective=objective, backbone_options=options, device="cpu", progress=False
        )
        model.set_params(validate_every=2, warmup_steps=0)
        runs.train_run(model, parts, home / name, max_steps=6, command=f"ndem-zoo train --objective {objective}")
    return home


@pytest.fixture(scope="module")
def summaries(results):
    return [read_run(results / name) for name in ("ndem & <co>", "plain")]


@pytest.fixture(scope="module")
def page(results, summaries):
    write_report(results / "report.html", summaries, title="Two runs")
    return results / "report.html"


# -------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is on the path")
    return found


def open_page(browser, file, folder, *options) -> subprocess.CompletedProcess:
    """Run the browser without a window; its own files go into `folder`."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    command += [f"--user-data-dir={folder}", f"--window-size={WIDTH},{HEIGHT}", "--virtual-time-budget=10000"]
    done = subprocess.run([*command, *options, file.as_uri()], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module", params=["light", "dark"])
def seen(request, browser, page, tmp_path_factory):
    """What the browser answers, and its picture of the page, for a reader who likes it light or dark."""
    folder = tmp_path_factory.mktemp(request.param)
    scheme = f"--blink-settings=preferredColorScheme={int(request.param == 'light')}"
    own = open_page(browser, page, folder / "profile", scheme, f"--screenshot={folder / 'page.png'}")
    assert "CONSOLE" not in own.stderr, own.stderr
    asking = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8"))
    (folder / "asking.html").write_text(asking.replace("</body>", QUESTIONS + "</body>"), encoding="utf-8")
    dumped = open_page(browser, folder / "asking.html", folder / "profile", scheme, "--dump-dom").stdout
    answer = re.search(r'<script type="application/json" id="answer">(.*?)</script>', dumped, re.DOTALL)
    assert answer, dumped[-2000:]
    picture = plots.require("matplotlib.image", extra="plots").imread(folder / "page.png")[..., :3]
    return request.param, json.loads(answer[1]), picture


def test_every_picture_is_there_and_drawn(seen, summaries):
    _, answer, picture = seen
    assert answer["errors"] == []
    assert len(answer["images"]) == 5  # curves, two parities, elements, sizes of forces
    for image in answer["images"]:
        assert image["natural"] > 400, image["alt"]
        left, top, right, bottom = (round(edge) for edge in image["box"])
        assert right - left > 300
        drawn = picture[top:bottom, left:right].reshape(-1, 3)
        assert len(np.unique(np.round(drawn, 2), axis=0)) > 20, f"blank: {image['alt']}"


def test_the_page_says_what_the_runs_say(seen, summaries):
    _, answer, _ = seen
    text = answer["text"]
    assert answer["title"] == "Two runs"
    for run in summaries:
        assert text.count(run.name) >= 3
        for key, factor, digits in (("energy_mae", 1, 5), ("forces_mae", 1e3, 2), ("forces_mae_kcal", 1, 4)):
            assert f"{factor * run.metrics[key]:.{digits}f}" in text
        assert run.record["command"] in text
    for section in ("Errors", "Training", "Figures", "To do it again"):
        assert section in text.splitlines()
    assert "30 test structures" in text


def luminance(color: str) -> float:
    """Of WCAG 2, from a color as browsers write it."""
    channels = np.array([float(value) for value in re.findall(r"[\d.]+", color)[:3]]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_it_can_be_read_in_light_and_dark(seen):
    """The reader's choice holds for page and pictures; contrast is WCAG's AAA for text, AA for captions."""
    scheme, answer, picture = seen
    assert (luminance(answer["ground"]) > 0.5) == (scheme == "light")
    assert contrast(answer["ground"], answer["ink"]) > 7
    assert contrast(answer["ground"], answer["dim"]) > 4.5
    assert contrast(*answer["head"]) > 7
    ground = np.array([float(value) for value in re.findall(r"[\d.]+", answer["ground"])[:3]]) / 255
    for image in answer["images"]:
        left, top = (round(edge) for edge in image["box"][:2])
        assert np.allclose(picture[top + 2, left + 2], ground, atol=0.02), "the picture has another ground"


def test_nothing_sticks_out_on_a_phone(browser, page, tmp_path):
    asking = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8"))
    frame = html.escape(asking.replace("</body>", QUESTIONS + "</body>"))
    file = tmp_path / "phone.html"  # browsers do not make their windows that narrow
    report = "parent.document.body.dataset.overflow = found.overflow;"
    frame = frame.replace("document.body.append(answer);", report)
    file.write_text(f'<iframe width="380" height="4000" srcdoc="{frame}"></iframe>', encoding="utf-8")
    dumped = open_page(browser, file, tmp_path / "profile", "--dump-dom").stdout
    assert re.search(r'data-overflow="(-?\d+)"', dumped)[1] == "0"


# ----------------------------------------------------------------------------------------------------- without a browser


class Elements(html.parser.HTMLParser):
    """All elements of a page with their attributes; complains about what is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, name: str) -> list[dict]:
        return [attributes for tag, attributes in self.found if tag == name]


def test_page_needs_nothing_and_runs_nothing(page):
    text = page.read_text(encoding="utf-8")
    elements = Elements(text)
    assert elements.open == []
    names = {tag for tag, _ in elements.found}
    assert not names & {"script", "link", "iframe", "object", "embed", "a"}
    (policy,) = [m["content"] for m in elements.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    places = [value for _, a in elements.found for key, value in a.items() if key in ("src", "srcset", "href")]
    assert len(places) == 10
    assert all(place.startswith("data:image/png;base64,") for place in places)
    assert not any(key.startswith("on") for _, a in elements.found for key in a)
    assert "url(" not in text
    assert "@import" not in text


def test_page_can_be_used_without_seeing_it(page, summaries):
    elements = Elements(page.read_text(encoding="utf-8"))
    assert elements.all("html")[0]["lang"] == "en"
    for image in elements.all("img"):
        assert len(image["alt"]) > 60
        assert re.search(r"\d", image["alt"]), "no number in it"
    assert all(cell["scope"] in ("col", "row") for cell in elements.all("th"))
    assert len(elements.all("caption")) == len(elements.all("table")) == 3
    forces = summaries[0].predictions.force_errors()
    (alt,) = [image["alt"] for image in elements.all("img") if image["alt"].startswith("Length of the force error")]
    smaller = forces[0] <= np.median(forces[0])
    assert f"{1e3 * forces[1][smaller].mean():.3g} meV/Å for the smaller half" in alt


def test_markdown_says_the_same(summaries, tmp_path):
    write_report(tmp_path / "report.md", summaries)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(shown) == 5
    assert "parity_ndem_co_.png" in shown
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in shown)
    assert f"| {1e3 * summaries[1].metrics['forces_mae']:.2f} |" in text
    with pytest.raises(ConfigError, match=r"must end in one of \.html"):
        write_report(tmp_path / "report.pdf", summaries)


def test_other_targets_have_their_rows_and_sentence():
    record = {
        "data": {"name": "qm9", "seed": 1, "n_train": 5},
        "objective": "supervised",
        "training": {"steps": 1, "seconds": 1.0, "interrupted": False},
        "environment": {"torch": "2"},
    }
    runs = [RunSummary(name, record | {"test": {"gap_mae": value}}) for name, value in (("a", 0.05), ("b", 0.1))]
    blocks = report_blocks(runs)
    (table,) = [block for block in blocks if getattr(block, "caption", "").startswith("Errors on")]
    assert table.rows == [["gap MAE (eV)", "0.05000", "0.10000"], ["gap MAE (meV)", "50.000", "100.000"]]
    assert any("gap error of a is 50 % smaller" in getattr(block, "text", "") for block in blocks)
    assert report_figures(runs) == []


# ------------------------------------------------------------------------------------------------- figures, predictions


def test_errors_by_force_are_means_of_equal_bins():
    rng = np.random.default_rng(0)
    size = rng.permutation(np.linspace(0.1, 6.0, 120))
    figure = plots.force_error_figure({"m": (size, 0.01 * size)}, n_bins=10)
    (line,) = figure.axes[0].get_lines()
    bins = np.sort(size).reshape(10, 12).mean(axis=1)
    np.testing.assert_allclose(line.get_xdata(), bins)
    np.testing.assert_allclose(line.get_ydata(), 10 * bins)
    plots.figure_bytes(figure)
    right = figure.axes[0].child_axes[0]
    np.testing.assert_allclose(np.array(right.get_ylim()) * 1e3 * KCAL_PER_MOL, figure.axes[0].get_ylim())


def test_bars_are_the_errors_of_the_elements():
    figure = plots.element_error_figure({"a": {"H": 0.01, "O": 0.03}, "b": {"H": 0.02}})
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights[:3] == [10.0, 30.0, 20.0]
    assert np.isnan(heights[3])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["H", "O"]
    colors = {bar.get_facecolor() for bar in figure.axes[0].patches[:2]}
    assert len(colors) == 1


def test_dark_figures_have_no_bright_ground_and_no_dark_text():
    figure = plots.darken(plots.element_error_figure({"a": {"H": 0.01}}))
    content = plots.require("matplotlib.image", extra="plots").imread(_stream(plots.figure_bytes(figure)))[..., :3]
    assert np.median(content) < 0.15
    assert content.max() > 0.8


def _stream(content: bytes):
    import io

    return io.BytesIO(content)


def test_predictions_survive_the_disk(results, ethanol):
    """What the folder holds is what the saved model predicts for the test frames."""
    kept = Predictions.load(results / "plain")
    model = runs.load_model(results / "plain")
    expected = model.predict(ethanol[200:230])
    assert (kept.part, kept.n_structures, len(kept.ptr)) == ("test", 30, 31)
    np.testing.assert_allclose(kept.predicted["energy"], expected["energy"], rtol=1e-12)
    np.testing.assert_allclose(kept.predicted["forces"].reshape(30, 9, 3), expected["forces"], rtol=1e-6)
    np.testing.assert_array_equal(kept.target["forces"], ethanol[200:230].targets["forces"])
    assert Predictions.load(results) is None


def test_of_many_structures_some_are_kept(tmp_path):
    from ndem_zoo.datasets.base import MolecularDataset

    n = 2 * MOST_STRUCTURES + 1
    z, pos = np.tile([1, 8], n), np.tile([[0.0, 0, 0], [0, 0, 1.0]], (n, 1))
    forces = np.arange(6.0 * n).reshape(-1, 3)
    fixed = np.tile([True, False], n)
    targets = {"energy": np.arange(float(n)), "forces": forces}
    dataset = MolecularDataset(z, pos, 2 * np.arange(n + 1), targets=targets, fixed=fixed)
    predicted = {"energy": targets["energy"] + 1, "forces": forces + [3.0, 0, 4.0], "other": np.zeros(n)}
    Predictions.of("valid", dataset, predicted).save(tmp_path)
    kept = Predictions.load(tmp_path)
    assert len(kept.ptr) - 1 == MOST_STRUCTURES
    assert kept.note() == f"{MOST_STRUCTURES:,} of {n:,} validation structures"
    np.testing.assert_array_equal(kept.predicted["energy"] - kept.target["energy"], 1.0)
    assert kept.target["energy"][[0, -1]].tolist() == [0.0, n - 1.0]
    size, error = kept.force_errors()
    assert len(size) == MOST_STRUCTURES, "fixed atoms do not count"
    np.testing.assert_allclose(error, 5.0)
    np.testing.assert_allclose(size[-1], np.linalg.norm(forces[-1]))


def test_damaged_predictions(tmp_path, results):
    shutil.copy(results / "plain" / FILE, tmp_path / FILE)
    with np.load(tmp_path / FILE) as archive:
        arrays = dict(archive)
    np.savez(tmp_path / FILE, **arrays | {"z": arrays["z"][:-1]})
    with pytest.raises(FileFormatError, match="do not fit together"):
        Predictions.load(tmp_path)
    (tmp_path / FILE).write_bytes((results / "plain" / FILE).read_bytes()[:500])
    with pytest.raises(FileFormatError, match="damaged"):
        Predictions.load(tmp_path)
