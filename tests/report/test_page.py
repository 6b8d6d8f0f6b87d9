"""The page and the sheet: complete, self-contained, safe to open, and drawn from the right numbers."""

import base64
import math
import re
from html.parser import HTMLParser

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kvlock_fast import media
from kvlock_fast.errors import OutputError
from kvlock_fast.media.metrics import measure_delivered, measure_edit
from kvlock_fast.report import charts, contact_sheet, drawing
from kvlock_fast.report.page import LARGEST, write_report
from kvlock_fast.tools import doctor
from tests.support.clipmaker import noise

HOSTILE = "</title><script>alert(1)</script> \"quoted\" & 'more'"


class Page(HTMLParser):
    """Tags, attributes and text of a page; void elements aside, every tag must be closed in order."""

    VOID = frozenset({"meta", "link", "input", "br", "rect", "line", "polyline", "circle", "img"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def trace(prompts=("a red ball",), steps=8, warmup=3):
    records = [
        {
            "step": k, "timestep": 1000.0 - k, "sigma": 1 - k / steps, "sample": i, "alpha": 1 - k / steps,
            "variance": None if k < 2 else 0.1 / k, "omega": 5.0 + i, "s_star": 0.9, "seconds": 0.25,
        }
        for k in range(steps) for i in range(len(prompts))
    ]  # fmt: skip
    return {
        "prompts": list(prompts), "samples": len(prompts), "steps": steps, "warmup_steps": warmup, "records": records,
    }  # fmt: skip


def clip(frames=5, height=32, width=48):
    source = noise(frames, height, width)
    mask = np.zeros((frames, height, width), dtype=bool)
    mask[:, 8:20, 10:30] = True
    edited = source.copy()
    edited[mask] = (200, 40, 40)
    return source, mask, edited


def write(path, **changes):
    source, mask, edited = clip()
    arguments = {
        "source": source, "mask": mask, "edited": [edited], "trace": trace(),
        "settings": {"seed": 7, "lock": {"tau": 0.01, "layers": [0, 1]}}, "command": "kvlock-fast edit",
    }  # fmt: skip
    write_report(path, **{**arguments, **changes})
    return Page(path.read_text())


def videos(page, folder):
    """The clips within the page, decoded."""
    found = []
    for i, attributes in enumerate(page.all("video")):
        kind, _, data = attributes["src"].partition(";base64,")
        assert kind == "data:video/mp4"
        file = folder / f"{i}.mp4"
        file.write_bytes(base64.b64decode(data))
        found.append(media.read_video(file))
    return found


def test_the_page_holds_everything(tmp_path):
    page = write(tmp_path / "r.html", fps=12)
    text = " ".join(" ".join(page.text).split())
    for piece in ("a red ball", "seed", "7", "lock", "tau", "0.01", "0, 1", "kvlock-fast edit", "warm-up", "τ = 0.01"):
        assert piece in text
    # The background is untouched; the windows of SSIM at its border are not.
    assert "∞" in text
    shown = videos(page, tmp_path)
    assert [len(v.frames) for v in shown] == [5, 5, 5, 5]
    assert all(v.fps == 12 for v in shown)
    source, _, edited = clip()
    for video, expected in ((shown[0], source), (shown[2], edited)):
        # 48 pixels across become 288.
        assert video.frames.shape[1:3] == (192, 288)
        small = video.frames[:, 3::6, 3::6].astype(int)
        assert np.abs(small - expected).mean() < 12


def test_the_figures_are_called_raw_or_delivered(tmp_path):
    source, mask, edited = clip()
    raw = np.clip(edited + np.int16(3), 0, 255).astype(np.uint8)
    told = {**measure_edit(source, mask, raw), **measure_delivered(source, mask, edited)}
    for values in (told, {**told, "delivered_psnr": None}):  # as JSON has an infinite one
        words = " ".join(" ".join(write(tmp_path / "r.html", metrics=[values]).text).split())
        assert "Delivered background PSNR ∞" in words and f"Delivered seam {told['delivered_seam']:.1f}" in words
        assert f"Raw background PSNR {told['background_psnr']:.1f}" in words and f"Raw seam {told['seam']:.1f}" in words
        assert "Raw foreground SSIM" in words and "Raw background flicker" in words
    # Without figures, what there is was delivered, and an older trace has the model's alone.
    words = " ".join(write(tmp_path / "r.html").text)
    assert "Delivered seam" in words and "Raw" not in words
    words = " ".join(write(tmp_path / "r.html", metrics=[{"background_psnr": 20.0, "background_ssim": 0.5}]).text)
    assert "Delivered" not in words and "Raw seam" not in words and "Raw background PSNR" in words


def test_nothing_is_fetched(tmp_path):
    page = write(tmp_path / "r.html")
    for _, attributes in page.tags:
        for name in ("src", "href", "action", "poster"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "://" not in re.sub(r"base64,[\w+/=]+", "", (tmp_path / "r.html").read_text())


def test_words_of_others_stay_words(tmp_path):
    settings = {HOSTILE: HOSTILE, "lock": {HOSTILE: HOSTILE}}
    page = write(tmp_path / "r.html", trace=trace([HOSTILE]), settings=settings, command=HOSTILE)
    assert len(page.all("script")) == 1
    assert " ".join(page.text).count("alert(1)") >= 5


def test_several_edits(tmp_path):
    source, _, edited = clip()
    page = write(tmp_path / "r.html", edited=[edited, source], trace=trace(["one ball", "two balls"]))
    assert [video["aria-label"] for video in page.all("video")] == [
        "Source", "Mask", "Edit 1", "Difference 1", "Edit 2", "Difference 2"
    ]  # fmt: skip
    text = " ".join(page.text)
    assert text.count("one ball") == text.count("two balls") == 3
    assert len(page.all("polyline")) == 2 * 4


def test_given_metrics_are_shown(tmp_path):
    page = write(tmp_path / "r.html", metrics=[{"background_psnr": 31.26, "background_ssim": 0.98765}])
    text = " ".join(page.text)
    assert "31.3" in text and "0.9877" in text
    assert "∞" in " ".join(write(tmp_path / "r.html", metrics=[{"background_psnr": None, "background_ssim": 1}]).text)


@pytest.mark.parametrize("case", ["one frame", "odd", "all foreground", "no records", "no steps dynamic", "calm"])
def test_odd_cases(tmp_path, case):
    source, mask, edited = clip(1 if case == "one frame" else 3, 33, 301) if case in ("one frame", "odd") else clip()
    changes = {"source": source, "mask": mask, "edited": [edited]}
    if case == "all foreground":
        changes["mask"] = np.ones_like(mask)
    if case == "no records":
        changes["trace"] = {**trace(), "records": []}
    if case == "no steps dynamic":
        changes["trace"] = trace(steps=1, warmup=20)
    if case == "calm":
        still = trace()
        still["records"] = [{**r, "variance": 0.0, "omega": 0.0} for r in still["records"]]
        changes["trace"] = still
    page = write(tmp_path / "r.html", **changes)
    assert "nan" not in " ".join(page.text).lower()
    for video in videos(page, tmp_path):
        assert video.frames.shape[1] % 2 == 0 and video.frames.shape[2] % 2 == 0
    contact_sheet.write_sheet(tmp_path / "s.png", changes["source"], changes["mask"], changes["edited"])


def test_browsers_can_decode_it(tmp_path):
    source, mask, edited = clip(2, 301, 303)
    videos(write(tmp_path / "r.html", source=source, mask=mask, edited=[edited]), tmp_path)
    for i in range(4):
        with av.open(str(tmp_path / f"{i}.mp4")) as container:
            assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"


def test_the_sheet(tmp_path):
    source, mask, edited = clip(9)
    contact_sheet.write_sheet(tmp_path / "s.png", source, mask, [edited])
    picture = Image.open(tmp_path / "s.png")
    # Four rows of six frames of 288x192, enlarged by nearest pixel, so the source's first frame is in it exactly.
    assert picture.width > 6 * 288 and picture.height > 4 * 192
    first = np.asarray(picture)[48 : 48 + 192, 24 : 24 + 288]
    assert np.array_equal(first, source[0].repeat(6, 0).repeat(6, 1))


@given(st.integers(0, 2**32 - 1))
def test_the_difference_is_the_largest_of_the_channels(seed):
    a, b = noise(2, 5, 7, seed), noise(2, 5, 7, seed + 1)
    levels = drawing.difference(a, b)
    assert levels.dtype == np.uint8 and np.array_equal(levels, np.abs(a.astype(int) - b).max(-1))


def test_the_scale_of_a_difference_is_that_of_the_background():
    levels = np.zeros((2, 10, 10), np.uint8)
    background = np.ones((2, 10, 10), bool)
    background[:, :5] = False
    levels[:, :5], levels[:, 5:] = 250, 20
    assert drawing.difference_scale([levels], background) == 32
    assert drawing.difference_scale([levels]) == 255
    assert drawing.difference_scale([levels], ~background & background) == 255
    assert drawing.difference_scale([0 * levels]) == drawing.SCALES[0]


def test_a_heat_map_grows_brighter_up_to_its_scale():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    drawn = drawing.heat(levels, 64).astype(int)
    brightness = (drawn @ [299, 587, 114]).ravel()
    assert (np.diff(brightness[:64]) > 0).all() and len(np.unique(drawn.reshape(-1, 3)[64:], axis=0)) == 1
    assert drawn[0, 0, 0].max() < 8


def test_the_difference_can_be_played_and_says_its_scale(tmp_path):
    source, mask, edited = clip()
    page = write(tmp_path / "r.html")
    assert "32 levels or more" in " ".join(" ".join(page.text).split())
    shown = videos(page, tmp_path)[3].frames[:, 3::6, 3::6]
    expected = drawing.heat(drawing.difference(source, edited), 32)
    assert np.abs(shown.astype(int) - expected)[~mask].mean() < 6 and shown[mask].mean() > 120


def test_a_page_of_what_there_is(tmp_path):
    """Without a source there is nothing to compare with; without any video the plots are left."""
    page = write(tmp_path / "r.html", source=None)
    assert [video["aria-label"] for video in page.all("video")] == ["Mask", "Edit"]
    page = write(tmp_path / "r.html", source=None, mask=None, edited=[], metrics=[{"background_ssim": 0.5}])
    assert not page.all("video") and not page.all("script") and len(page.all("polyline")) == 4
    assert "0.5000" in " ".join(page.text)
    page = write(tmp_path / "r.html", mask=None)
    assert [video["aria-label"] for video in page.all("video")] == ["Source", "Edit", "Difference"]


def test_large_videos_are_shown_smaller(tmp_path):
    source = noise(2, 40, 1400)
    page = write(tmp_path / "r.html", source=source, mask=np.ones(source.shape[:3], bool), edited=[source])
    assert {video["width"] for video in page.all("video")} == {str(LARGEST)}
    contact_sheet.write_sheet(tmp_path / "s.png", source, np.ones(source.shape[:3], bool), [source])
    assert Image.open(tmp_path / "s.png").width < 3 * contact_sheet.LARGEST


def test_outline_marks_the_border_and_nothing_else():
    source, mask, _ = clip()
    drawn = drawing.outline(source, mask)
    pink = (drawn == (255, 64, 129)).all(-1)
    assert pink[0, 8:20, 10].all() and pink[0, 19, 10:30].all()
    assert not pink[0, 9:19, 11:29].any() and not pink[~mask].any()
    assert np.array_equal(drawn[mask & ~pink], source[mask & ~pink])
    # Where everything is foreground there is no border, not even at the picture's edge.
    assert np.array_equal(drawing.outline(source, np.ones_like(mask)), source)


@pytest.mark.parametrize("place", ["missing/r.html", "folder"])
def test_unwritable(tmp_path, place):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=place):
        write(tmp_path / place)
    source, mask, edited = clip()
    with pytest.raises(OutputError, match=place):
        contact_sheet.write_sheet(tmp_path / place, source, mask, [edited])
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@given(st.lists(st.floats(-1e9, 1e9, allow_subnormal=False), max_size=9))
def test_ticks_enclose_the_values(values):
    values = [v for v in values if v == 0 or abs(v) > 1e-9]
    ticks = charts.axis_ticks(values)
    slack = 1e-6 * (ticks[-1] - ticks[0])
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= min([0, *values]) + slack and ticks[-1] >= max([0, *values]) - slack
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_charts_put_values_where_they_belong():
    panels = {c["title"]: c for c in charts.schedule_charts(trace(), {"lock": {"tau": 0.02}})}
    alpha = panels["Locking α"]
    points = [tuple(map(float, p.split(","))) for p in alpha["lines"][0]["points"].split()]
    assert len(points) == 8
    top, bottom = charts.TOP, charts.HEIGHT - charts.BOTTOM
    assert points[0][1] == pytest.approx(top, abs=0.1)
    assert points[4][1] == pytest.approx((top + bottom) / 2, abs=0.1)
    # Three of eight steps are warm-up.
    assert alpha["warmup"] == pytest.approx(3 / 8 * (charts.WIDTH - charts.LEFT - charts.RIGHT), abs=0.1)
    variance = panels["Variance of the predictions"]
    assert len(variance["lines"][0]["points"].split()) == 6
    assert variance["reference"]["label"] == "τ = 0.02" and alpha["reference"] is None


def test_doctor_says_what_is_there_and_what_is_missing(monkeypatch):
    facts = doctor.report()
    assert facts["parts"]["torch"]["version"] and facts["parts"]["torch"]["error"] is None
    text = doctor.render(facts)
    assert text.count("\n") > 10 and "will use" in text
    assert math.isfinite(facts["memory"] or 0)


def test_doctor_survives_an_empty_and_a_broken_installation(monkeypatch):
    def nothing(name):
        raise doctor.PackageNotFoundError(name)

    def broken(name):
        raise OSError(f"{name}: undefined symbol\nand more")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    facts = doctor.report()
    assert "OSError: torch: undefined symbol" in facts["parts"]["torch"]["error"]
    assert "broken" in doctor.render(facts) and "and more" not in doctor.render(facts)
    monkeypatch.setattr(doctor, "version", nothing)
    monkeypatch.setattr(doctor, "find_spec", nothing)
    facts = doctor.report()
    assert all(part["version"] is None for part in facts["parts"].values())
    assert facts["will_use"]["attention"] == "nothing"
    assert doctor.render(facts).count("missing") >= len(facts["parts"])


def test_tokens_computed_are_shown_where_they_are_fewer(tmp_path):
    """A chart and a line of facts; nothing where every step computed all, or the trace is older than the figure."""
    from kvlock_fast.report.charts import schedule_charts

    record = {"sample": 0, "variance": 1.0, "alpha": 1.0, "omega": 1.0, "s_star": 1.0, "seconds": 0.1}
    trace = {"prompts": ["a"], "steps": 4, "warmup_steps": 2, "tokens": 40}
    counts = {"few": [10, 10, 10, 40], "all": [40] * 4, "unknown": None}
    for name, tokens in counts.items():
        records = [{**record, "step": k} | ({"tokens": tokens[k]} if tokens else {}) for k in range(4)]
        found = (
            {**trace, "records": records}
            if tokens
            else {"prompts": ["a"], "steps": 4, "warmup_steps": 2, "records": records}
        )
        titles = [chart["title"] for chart in schedule_charts(found, {})]
        write_report(
            tmp_path / f"{name}.html", source=None, mask=None, edited=[], trace=found, settings={}, command="c"
        )
        page = (tmp_path / f"{name}.html").read_text()
        assert ("Tokens computed" in titles) == ("44% of 40 tokens computed" in page) == (name == "few")
