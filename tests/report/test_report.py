"""The report from run folders: every section, its words and numbers, its size, and that data stay data."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from tests.report import runs
from vlmpo.errors import RunError
from vlmpo.report.content import Limits, report_of, run_names
from vlmpo.report.curves import both_fall, margin_chart, thinned
from vlmpo.report.files import Run, read_runs
from vlmpo.report.kept import KeptData, read_kept
from vlmpo.report.page import html_page
from vlmpo.report.pairs import answer_views, fitted_thumbnails, pair_views
from vlmpo.report.picture import png_picture
from vlmpo.report.write import MAX_BYTES, write_report

SECTIONS = [
    *("summary", "loss", "rewards", "logps", "margins", "sources", "pairs", "answers", "machine", "counts"),
    *("recipe", "environment"),
]
CHARTS = [
    *("loss", "terms", "nll", "rewards", "margin", "accuracy", "delta", "logps", "margins", "sources", "answered"),
    *("learning_rate", "grad_norm", "speed", "waiting", "memory"),
]

TAGS = frozenset(
    re.findall(
        r"\w+",
        """html head meta title style body a header div p h1 h2 h3 h4 h5 button nav ul li main noscript section figure
        span figcaption details summary table caption thead tbody tr th td article img pre script strong""",
    )
)


class Elements(HTMLParser):
    """Every element of a page: its name, its attributes, and the text in it."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), []))
        if tag not in self.VOID:
            self._open.append(len(self.found) - 1)

    def handle_endtag(self, tag):
        assert self.found[self._open.pop()][0] == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        for at in self._open[-1:]:
            self.found[at][2].append(data)

    def named(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, "".join(texts)) for name, attributes, texts in self.found if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_run(tmp_path_factory.mktemp("runs") / "mpo")


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return html_page(report_of(read_runs(folder), Limits()))


def check_policy(page: str) -> None:
    """The policy allows two scripts, by their hashes, which are those in the page; nothing else may load or run."""
    elements = Elements(page)
    (policy,) = (a["content"] for a, _ in elements.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    assert set(rules) == {"default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"}
    scripts = [text for attributes, text in elements.named("script") if "type" not in attributes]
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts]
    assert rules["script-src"].split() == hashes
    assert len(hashes) == 2
    for tag, attributes, _ in elements.found:
        assert tag not in ("iframe", "object", "embed", "link", "base", "form"), tag
        assert not [name for name in attributes if name.startswith("on")], attributes
        for name in ("src", "href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/png;base64,", "data:image/jpeg;base64,")), value


def test_a_page_has_every_section_and_chart_and_loads_nothing(page):
    check_policy(page)
    elements = Elements(page)
    assert [a["id"] for a, _ in elements.named("section")] == SECTIONS
    assert [a["data-chart"] for a, _ in elements.named("div") if "data-chart" in a] == CHARTS
    (data,) = (text for a, text in elements.named("script") if a.get("type") == "application/json")
    assert list(json.loads(data)["charts"]) == CHARTS


def test_a_page_can_be_read_without_seeing_or_a_mouse(page):
    elements = Elements(page)
    ids = [a["id"] for _, a, _ in elements.found if a.get("id")]
    assert len(ids) == len(set(ids))
    for _, attributes, _ in elements.found:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name, ids[0]) in ids
    assert all(a["alt"] for a, _ in elements.named("img"))
    levels = [int(tag[1]) for tag, _, _ in elements.found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    plots = [a for a, _ in elements.named("div") if "data-chart" in a]
    assert all(a["role"] == "img" and a["aria-describedby"] for a in plots)
    assert len(elements.named("details")) >= len(plots)  # a table for each chart
    assert {a["href"] for a, _ in elements.named("a")} == {"#main", *(f"#{name}" for name in SECTIONS)}


def test_words_and_numbers(folder):
    report = report_of(read_runs(folder), Limits())
    sections = {section.id: section for section in report.sections}
    assert sections["summary"].texts == [
        "mpo: MPO of tiny (sigmoid, bco_pair, nll), on 100 pairs of 1 data set. Begun 2026-01-02 03:04 UTC, it "
        "finished at step 80 in 4 minutes. Last logged: loss 1, reward accuracy 1.000, reward margin +2."
    ]
    charts = {chart.id: chart for section in report.sections for chart in section.charts}
    assert charts["loss"].summary == [
        "training: from 1.988 (step 1) to 1 (step 80), between 1 and 1.988",
        "held out: from 1.85 (step 20) to 1.1 (step 80), between 1.1 and 1.85",
    ]
    assert charts["loss"].header == ["step", "training", "held out"]
    assert charts["loss"].rows[-1] == ["80", "1", "1.1"]
    assert charts["waiting"].lines[0].y[0] == 3.0  # percent
    accuracy = charts["accuracy"].lines[1]
    assert (accuracy.held_out, accuracy.y[0], accuracy.low, accuracy.high) == (
        True,
        0.25,
        [0.15, 0.4, 0.65, 0.9],
        [0.35, 0.6, 0.85, 1.1],
    )
    (held_out,) = sections["sources"].tables
    assert held_out.rows[1] == [
        *("final model", "held_out", "charts", "7"),
        *("0.800 [0.500, 0.950]", "+1.500 [+1.000, +2.000]"),
    ]
    assert sections["counts"].tables[0].rows == [["charts", "100", "90", "7", "3", "0"]]
    assert sections["counts"].tables[1].rows == [["charts", "missing_image", "3"]]
    assert sections["answers"].tables[0].rows == [["not right", "right", "1"]]
    assert ["seed", "7"] in sections["environment"].tables[0].rows


def test_it_warns_when_both_log_probs_fall():
    falling, fine = (Run(Path("x"), "x", logs=runs.logs(falling=falls)) for falls in (True, False))
    falling.recipe = {"loss": {"beta": 0.1}}
    warning = both_fall(falling)
    # rewards over the last 8 steps: the mean of step / 80 is 0.95625, in nats ten times as much
    assert "of the chosen ones by 9.56 nats" in warning
    assert "rejected ones by 28.7 nats" in warning
    assert both_fall(fine) is None
    noisy = [{"step": n, "loss": 1.0, "rewards/chosen": (-1) ** n - 0.01, "rewards/rejected": -1.0} for n in range(200)]
    assert both_fall(Run(Path("x"), "x", logs=noisy)) is None  # within two standard errors of 0
    assert both_fall(Run(Path("x"), "x")) is None


def test_curves_are_thinned_by_means():
    x, y = thinned([1, 2, 3, 4, 5], [1.0, 3.0, None, float("nan"), 5.0], 2)
    assert (x, y) == ([2, 5], [2.0, 5.0])
    assert thinned([1, 2], [1.23456789, None], 2) == ([1, 2], [1.23457, None])


def test_histograms_share_their_bins():
    kept = KeptData(window=4)
    kept.see(1, [("a", 0.0), ("b", 0.0), ("c", 0.0), ("d", 0.0)])
    kept.see(2, [("a", 1.0), ("b", 4.0), ("c", -1.0), ("d", 4.0), ("e", float("nan"))])
    (chart,) = margin_chart([Run(Path("x"), "x", kept=kept)], ["x"])
    start, end = chart.lines
    assert start.x == end.x
    assert sum(start.y) == sum(end.y) == pytest.approx(100.0)
    assert start.y[8] == 100.0  # from -1 to 4 in 40 bins, 0 begins the ninth
    assert end.y[-1] == 50.0
    assert chart.rows[1] == ["end", "4", "-1", "+4", "+4", "25%"] or chart.rows[1][2:] == ["-1", "+1", "+4", "25%"]


def test_kept_margins_survive_writing_and_a_resume(tmp_path):
    kept = KeptData(window=3)
    for step in range(1, 6):
        kept.see(step, [(f"p:{step}", float(step)), ("p:1", -float(step))])
    kept.pairs = [runs.scored_pair(1)]
    kept.write(tmp_path)
    assert read_kept(tmp_path) == kept
    assert kept.first == [(1, 1.0), (1, -1.0), (2, 2.0)]
    assert list(kept.last) == [(4, -4.0), (5, 5.0), (5, -5.0)]
    assert kept.largest["p:1"] == (5, -5.0)  # the last sight counts
    kept.forget_after(4)
    assert list(kept.last) == [(4, -4.0)]
    assert "p:5" not in kept.largest
    assert not kept.pairs
    (tmp_path / "report_data.json").write_text('{"window": 1')
    assert read_kept(tmp_path) is None


def test_the_extremes_are_taken_in_turn_and_memory_is_bounded():
    kept = KeptData()
    kept.see(1, [(f"p:{number}", float(number)) for number in range(1000)])
    assert len(kept.largest) == len(kept.smallest) == 32
    extremes = kept.extremes()
    assert extremes[:2] == [("p:0", "smallest", 1, 0.0), ("p:999", "largest", 1, 999.0)]
    assert len(extremes) == 16


def test_tokens_are_coloured_by_how_far_they_moved():
    (view,) = pair_views([runs.scored_pair(1)], "largest", 4, {})
    chosen, rejected = view.responses
    assert [token.css for token in chosen.tokens] == ["", "up1", "up2", "up3", "more"]
    assert [token.css for token in rejected.tokens] == ["", "down1", "down2", "down3", "more"]
    assert chosen.tokens[2].title == "+0.50 nats: -0.50, reference -1.00"
    assert chosen.tokens[-1].text == " … 1 more token"
    assert "most raised: “word” +4.00, “word” +2.00, “word” +0.50" in chosen.summary
    assert "+6.61 nats" in chosen.summary
    assert view.image_note == "2 more images or videos are not shown"


def test_answers_that_changed_come_first(tmp_path):
    def answers(verdicts: str) -> list[dict]:
        status = {"+": "correct", "-": "incorrect", "?": "unparsed"}
        return [{"question_id": at, "text": f"{at}", "status": status[v]} for at, v in enumerate(verdicts)]

    run = Run(tmp_path, "x", answers=(answers("+-+?"), answers("++-?")))
    views, table = answer_views(run)
    assert [view.after[0] for view in views] == ["1", "2", "3", "0"]
    assert table == [
        *(["not right", "not right", "1"], ["not right", "right", "1"]),
        *(["right", "not right", "1"], ["right", "right", "1"]),
    ]


def test_several_runs_are_overlaid(folder, tmp_path):
    other = runs.write_run(tmp_path / "other" / "mpo")
    both = [*read_runs(folder), *read_runs(other)]
    names = run_names(both)
    assert names == [f"{folder.parent.name}/mpo", "other/mpo"]
    report = report_of(both, Limits())
    assert report.title == f"2 runs: {', '.join(names)}"
    (loss,) = (chart for section in report.sections for chart in section.charts if chart.id == "loss")
    assert [(line.run, line.held_out) for line in loss.lines] == [(0, False), (0, True), (1, False), (1, True)]
    check_policy(html_page(report))
    assert run_names([both[0], both[0]]) == [names[0], f"{names[0]} (2)"]


def test_hostile_data_stay_data(tmp_path):
    folder = runs.write_run(tmp_path / "run", text=runs.HOSTILE, source=runs.HOSTILE)
    report = report_of(read_runs(folder), Limits())
    page = html_page(report)
    check_policy(page)
    elements = Elements(page)
    assert {tag for tag, _, _ in elements.found} <= TAGS
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", page.replace(elements.named("script")[1][1], ""))
    assert "{{ 7 * 7 }}" in page.replace(elements.named("script")[1][1], "")
    png_picture(report)


def test_a_word_of_a_megabyte_does_not_swell_the_page(tmp_path):
    word = "x" * 1_000_000
    folder = runs.write_run(tmp_path / "run", text=word, source="charts")
    write_report([folder], folder, with_picture=False)
    assert (folder / "report.html").stat().st_size < 5_200_000


def test_many_large_images_fit(tmp_path):
    images = [runs.noise(320, seed) for seed in range(8)]
    folder = runs.write_run(tmp_path / "run", images=images)
    (run,) = read_runs(folder)
    urls = fitted_thumbnails([run], 2_000_000)
    assert len(urls) == 8
    assert sum(map(len, urls.values())) <= 2_000_000
    other = runs.write_run(tmp_path / "more", images=[runs.noise(320, seed) for seed in range(20, 28)])
    write_report([folder, other], tmp_path)
    assert (tmp_path / "report.html").stat().st_size <= MAX_BYTES
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width == 1200
    assert (
        fitted_thumbnails([Run(tmp_path, "x", kept=KeptData(pairs=[runs.scored_pair(1, image="PHNjcmlwdD4")]))], 99)
        == {}
    )


def test_the_picture_is_small(folder):
    picture = png_picture(report_of(read_runs(folder), Limits()))
    assert len(picture) < 300_000
    with Image.open(io.BytesIO(picture)) as image:
        assert image.size == (1200, 540)


def test_a_run_under_way_shows_its_curves(tmp_path):
    folder = runs.write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 81, "lo')  # it is writing just now
    report = report_of(read_runs(folder), Limits(), curves_only=True)
    assert [section.id for section in report.sections] == [s for s in SECTIONS if s not in ("pairs", "answers")]
    assert not [section for section in report.sections if section.id == "sources" and section.tables]


def test_files_that_are_absent_or_damaged_are_left_out(tmp_path):
    folder = runs.write_run(tmp_path / "run")
    for name in ("manifest.json", "recipe.yaml", "report_data.json", "answers.jsonl"):
        (folder / name).write_bytes(b"\xff{]: : [")
    sections = [section.id for section in report_of(read_runs(folder), Limits()).sections]
    assert sections == ["summary", "loss", "rewards", "logps", "sources", "answers", "machine", "recipe"]
    assert html_page(report_of(read_runs(folder), Limits()))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RunError, match="holds no run"):
        read_runs(empty)
    with pytest.raises(RunError, match="is no folder"):
        read_runs(tmp_path / "absent")
