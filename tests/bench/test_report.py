"""Result files: verdicts that know about noise, and reports that one can look at."""

from __future__ import annotations

import copy
import html.parser
import re

import numpy as np
import pytest

from edet.bench import report


def row(stage, medians, *, model="tf_efficientdet_d0", noise=0.01, rounds=40, seed=0, **extra):
    generator = np.random.default_rng(seed)
    times = {
        name: report.summary([m * float(np.exp(noise * generator.standard_normal()))
                              for _ in range(rounds)])
        for name, m in medians.items()
    }  # fmt: skip
    best, ratios = report.compare(times)
    return {
        "model": model, "image_size": [512, 512], "dtype": "float32", "stage": stage,
        "macs": 136_000_000, "parameters": 3_900_000, "bytes": 20_000_000, "rounds": rounds,
        "times": times, "unavailable": {}, "best_rival": best, "ratios": ratios,
        "peak_fraction": {"ours": 0.25}, **extra,
    }  # fmt: skip


def result(*rows):
    return {
        "schema": report.SCHEMA, "date": "2026-01-02T03:04:05+00:00", "revision": None,
        "machine": {"cpu": "A CPU <fast> & small"}, "versions": {"torch": "2.13.0"}, "threads": 2,
        "settings": {"bandwidth_gbs": 20.0}, "peak_gflops": {"float32": 200.0}, "rows": list(rows),
        "scaling": [], "memory": [], "fusion": [],
    }  # fmt: skip


def word(before, after, **options):
    (found,) = report.verdicts(result(before), result(after), **options)
    return found


@pytest.mark.parametrize(
    ("ours", "expected"), [(2.0, "same"), (1.7, "faster"), (2.3, "slower"), (2.005, "same")]
)
def test_clear_changes_are_seen(ours, expected):
    before = row("BiFPN", {"eager": 10.0, "ours": 2.0})
    found = word(before, row("BiFPN", {"eager": 10.0, "ours": ours}, seed=1))
    assert found.word == expected
    assert found.low <= found.ratio <= found.high
    assert found.ratio == pytest.approx(ours / 2.0, rel=0.02)


def test_noise_is_not_a_change():
    words = [
        word(
            row("BiFPN", {"ours": 2.0}, noise=0.3, rounds=10, seed=2 * seed),
            row("BiFPN", {"ours": 2.0}, noise=0.3, rounds=10, seed=2 * seed + 1),
        ).word
        for seed in range(40)
    ]
    assert words.count("faster") + words.count("slower") <= 4
    assert words.count("unclear") > 20


def test_a_slower_machine_is_not_slower_code():
    before = row("BiFPN", {"eager": 10.0, "torch.compile": 5.0, "ours": 2.0})
    slow = row("BiFPN", {"eager": 15.0, "torch.compile": 7.5, "ours": 3.0}, seed=1)
    found = word(before, slow)
    assert found.word == "same" and found.drift == pytest.approx(1.5, rel=0.02)
    alone = word(row("BiFPN", {"ours": 2.0}), row("BiFPN", {"ours": 3.0}, seed=1))
    assert alone.word == "slower" and alone.drift == 1


def test_tolerance():
    before = row("heads", {"ours": 2.0}, noise=0.001)
    after = row("heads", {"ours": 2.1}, noise=0.001, seed=1)
    assert word(before, after).word == "slower"
    assert word(before, after, tolerance=0.1).word == "same"


def test_rows_are_matched_by_what_they_measure():
    rows = [
        row("BiFPN", {"ours": 2.0}),
        row("BiFPN", {"ours": 5.0}, batch_size=4),
        row("heads", {"ours": 1.0}),
    ]
    other = [copy.deepcopy(rows[1]), row("network", {"ours": 1.0}), copy.deepcopy(rows[0])]
    found = report.verdicts(result(*rows), result(*other))
    assert [v.row.split(" float32 ")[0][-7:] for v in found] == ["batch 1", "batch 4"]
    assert [v.word for v in found] == ["same", "same"]
    with pytest.raises(ValueError, match="a row in common"):
        report.verdicts(result(rows[2]), result(rows[0]))


def full():
    rows = []
    for k, model in enumerate(("tf_efficientdet_d0", "tf_efficientdet_d1")):
        for stage, ours in (("backbone", 9.0), ("BiFPN", 2.0), ("heads", 3.0), ("network", 14.0)):
            medians = {"eager softmax": 33.0, "eager fast": 30.0, "ours": ours * (1 + k)}
            if stage in ("backbone", "heads"):
                del medians["eager softmax"]
            more = {"parameters": 4_000_000 * (k + 1), "macs": 10**8 * (k + 1)}
            rows.append(row(stage, medians, model=model, **more))
    rows.append(row("pre-processing", {"ours": 1.0}, macs=0, bytes=0))
    return result(*rows)


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.tags, self.sources = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [v for k, v in attributes if k in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    written = report.write_report(full(), tmp_path / "new" / "report")
    names = {"latency.png", "stages.png", "roofline.png", "fusion.png", "report.md", "report.html"}
    assert {p.name for p in written} == names
    assert {p.name for p in (tmp_path / "new" / "report").iterdir()} == names
    text = (tmp_path / "new" / "report" / "report.md").read_text()
    assert set(re.findall(r"\]\((\w+\.png)\)", text)) == {n for n in names if n.endswith("png")}
    assert "| D1 512×512 | network |" in text
    assert "paper, table 2" in text and "V100" in text  # with their hardware
    page = Page()
    page.feed((tmp_path / "new" / "report" / "report.html").read_text())
    assert page.open == [] and page.tags.count("img") == 4 and page.tags.count("table") == 2
    assert len(page.sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)


def test_a_note_stands_above_the_table():
    noted = full()
    assert report.markdown(noted).split("\n\n")[0].endswith("against ours.")
    noted["settings"]["note"] = "The machine was shared."
    assert report.markdown(noted).split("\n\n")[0].endswith("ours. The machine was shared.")


def test_throughput_over_batch_sizes(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    batches = result(
        row("network", {"eager": 20.0, "ours": 10.0}, noise=0.0),
        row("network", {"eager": 120.0, "ours": 64.0}, noise=0.0, batch_size=8),
    )
    text = report.markdown(batches)
    assert "| edet-kernels | images/s | best |" in text
    assert "| D0 512×512 | network | 20.0 (2.0×) | **10.00** | 100.0 |" in text
    assert "| D0 512×512, batch 8 | network | 120.0 (1.9×) | **64.00** | 125.0 |" in text
    assert tmp_path / "throughput.png" in report.write_report(batches, tmp_path)
    (axes,) = report.plot_throughput(batches).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn["edet-kernels"] == [[1, 100], [8, 125]]
    assert report.plot_throughput(full()) is None


def test_text_in_the_page_is_escaped():
    page = report.html(full(), [])
    assert "A CPU &lt;fast&gt; &amp; small" in page and "<fast>" not in page


def test_a_report_has_the_plots_that_there_is_data_for(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    short = result(row("network + post-processing", {"ours": 2.0}))
    names = {p.name for p in report.write_report(short, tmp_path)}
    assert names == {"report.md", "report.html", "roofline.png"}
