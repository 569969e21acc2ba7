"""The report: complete, self-contained, and undisturbed by what a killed run leaves behind."""

import builtins
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from headrace.errors import UserError
from headrace.pretrain.figures import short_count, smoothed
from headrace.pretrain.report import read_curves, write_report
from headrace.pretrain.routing_report import read_routing

FIGURES = ["bits_per_byte", "gradient_norm", "learning_rate", "loss", "tokens_per_second"]


def train(step: int, **change: object) -> str:
    record = {
        "kind": "train",
        "step": step,
        "tokens": 100 * step,
        "loss": 9.0 / step,
        "lr": 1e-3,
        "grad_norm": 1.0 / step,
        "tokens_per_s": 500.0,
        "seconds": 0.2,
        "skipped": 0,
    }
    return json.dumps(record | change)


def heldout(step: int) -> str:
    return json.dumps(
        {"kind": "eval", "step": step, "tokens": 100 * step, "loss": 3.0 / step, "bits_per_byte": 2.0 / step}
    )


def make_run(folder: Path, lines: list[str], **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


class Page(HTMLParser):
    """Collects what a page refers to, its words, and whether its tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.alternatives: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img", "source", "br", "link"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href", "data", "action"):
                self.references.append(value or "")
            if name == "alt":
                self.alternatives.append(value or "")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def test_a_whole_run(tmp_path):
    results = {"bits_per_byte": 1.4321, "gzip_bits_per_byte": 1.5987, "xz_bits_per_byte": None, "parameters": 1234567}
    run = make_run(
        tmp_path / "run",
        [train(step) for step in range(1, 60)] + [heldout(20), heldout(40)],
        results_json=json.dumps(results),
        manifest_json=json.dumps({"packages": {"torch": "2.13.0"}, "seed": 7}),
        config_toml='[run]\nname = "my run"\n',
    )
    path = write_report(run)
    assert path == run / "report.html"
    assert sorted(file.stem for file in (run / "figures").iterdir()) == FIGURES
    for file in (run / "figures").iterdir():
        assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    text = path.read_text()
    page = Page(text)
    for words in [
        "my run",
        "59 steps",
        "5.9 K tokens",
        "1.4321",
        "gzip -9",
        "1.5987",
        "packages.torch",
        "2.13.0",
        "seed",
    ]:
        assert words in page.words, words
    assert "xz -9" not in page.words
    assert len(page.alternatives) == len(FIGURES)
    assert all(len(alternative) > 30 for alternative in page.alternatives)


def test_nothing_is_loaded_from_anywhere(tmp_path):
    text = write_report(make_run(tmp_path / "run", [train(1), train(2), heldout(2)])).read_text()
    page = Page(text)
    assert len(page.references) == 2 * len(FIGURES)
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r"base64,[^\"]*", "", text))


def test_words_from_files_are_escaped(tmp_path):
    evil = '<script>alert("x")</script>'
    run = make_run(
        tmp_path / evil.replace("/", "|"),
        [train(1)],
        manifest_json=json.dumps({evil: evil, "list": [evil]}),
        results_json=json.dumps({evil: evil}),
        config_toml=f"# {evil}\n",
    )
    page = Page(write_report(run).read_text())
    assert "script" not in page.tags
    assert evil in page.words


def routing(step: int, first: list[float], **change: object) -> str:
    """Two layers; in the second all tokens go to the first expert."""
    record = {
        "kind": "routing",
        "step": step,
        "layers": [1, 4],
        "load": [first, [1.0, 0.0, 0.0, 0.0]],
        "max_violation": [max(first) * 4 - 1, 3.0],
        "entropy": [1.2, 0.5],
        "bias": [[0.0, 0.0, -0.125, 0.0], [0.0] * 4],
        "dropped": 0,
    }
    return json.dumps(record | change)


def test_routing(tmp_path):
    even, uneven = [0.25] * 4, [0.5, 0.5, 0.0, 0.0]
    lines = [line for step in range(1, 31) for line in (train(step), routing(step, uneven if step < 21 else even))]
    lines += [routing(30, uneven, load="broken"), routing(29, even, layers=[1]), routing(28, even, entropy=None)]
    run = make_run(tmp_path / "run", lines)
    page = Page(write_report(run).read_text())
    for words in (
        "Routing",
        "4.00 times the mean (layer 4, expert 0)",
        "layer 4: expert 1, layer 4: expert 2, layer 4: expert 3",
        "-0.125 (layer 1, expert 2)",
        "tokens dropped",
        "from 0.00 to 4.00 (layer 4, expert 0); 1 is even",
    ):
        assert words in page.words, words
    names = {"routing_load", "routing_max_violation", "routing_entropy"}
    assert names < {file.stem for file in (run / "figures").iterdir()}


def test_routing_of_a_resumed_run(tmp_path):
    """What was trained again counts once, as it was the last time; the load is that of the last ten records."""
    first, again = [1.0, 0.0, 0.0, 0.0], [0.25] * 4
    lines = [routing(step, first) for step in range(1, 13)] + [routing(step, again) for step in range(3, 13)]
    records = [json.loads(line) for line in lines]
    curves = read_routing(records, {step: 100.0 * step for step in range(1, 13)})
    assert curves.tokens.tolist() == [100.0 * step for step in range(1, 13)]
    assert curves.max_violation[:, 0].tolist() == [3.0, 3.0, *[0.0] * 10]
    assert curves.load.tolist() == [[1.0] * 4, [4.0, 0.0, 0.0, 0.0]]
    assert read_routing([], {}) is None


def test_routing_of_many_layers_and_experts(tmp_path, recwarn):
    layers, experts = 30, 128
    load = [[1 / experts] * experts for _ in range(layers)]
    many = {"layers": [*range(layers)], "load": load, "bias": [[0.0] * experts] * layers}
    many |= {"max_violation": [0.0] * layers, "entropy": [math.log(experts)] * layers}
    record = {"kind": "routing", "step": 1, "dropped": 0, **many}
    run = make_run(tmp_path / "run", [train(1), json.dumps(record)])
    assert "experts without a token at the end" in Page(write_report(run).read_text()).words
    assert [str(warning.message) for warning in recwarn] == []


def test_what_a_killed_run_leaves_behind(tmp_path):
    lines = [train(1), train(2), train(3, loss=77.0), heldout(3), train(3), train(4, loss=None, grad_norm=None)]
    lines += [train(5, loss=math.nan, tokens_per_s=math.inf), "[]", '{"kind": "train"}', '{"kind": "train", "st']
    run = make_run(tmp_path / "run", lines)
    curves = read_curves(run / "metrics.jsonl", {})
    assert curves.train["step"].tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_equal(curves.train["loss"], [9.0, 4.5, 3.0, math.nan, math.nan])
    assert curves.heldout["bits_per_byte"].tolist() == [2 / 3]
    assert curves.restarts == [300.0]
    assert "1 restart" in Page(write_report(run).read_text()).words


def test_a_start_record_is_a_restart(tmp_path):
    start = [json.dumps({"kind": "start", "step": step, "tokens": 100 * step}) for step in (0, 2)]
    run = make_run(tmp_path / "run", [start[0], train(1), train(2), start[1], train(3)])
    assert read_curves(run / "metrics.jsonl", {}).restarts == [200.0]


@pytest.mark.parametrize(
    "lines", [[train(1)], [heldout(5)], [train(1, loss=None, grad_norm=None), train(2, loss=None)]]
)
def test_a_run_with_little_in_it(tmp_path, lines, recwarn):
    run = make_run(tmp_path / "run", lines, manifest_json="{cut", results_json="[]", config_toml="= broken")
    assert "run" in Page(write_report(run).read_text()).words
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("lines", [None, [], ["not JSON"]])
def test_no_metrics(tmp_path, lines):
    if lines is not None:
        make_run(tmp_path, lines)
    with pytest.raises(UserError, match="has no metrics"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_no_matplotlib(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"headrace\[report\]"):
        write_report(make_run(tmp_path / "run", [train(1)]))


def test_smoothing():
    values = np.arange(500.0)
    np.testing.assert_allclose(smoothed(values)[:494], values[:494])  # a straight line stays: no lag
    values[100] = math.nan
    assert np.isfinite(smoothed(values)).all()
    noise = np.random.default_rng(0).normal(size=5000)
    assert smoothed(noise)[1000:4000].std() < 0.15
    assert np.isnan(smoothed(np.full(3, math.nan))).all()


def test_short_count():
    counts = [0, 950, 999.9, 1500, 12_345_678, 4e9, 1.2e12]
    assert [short_count(value) for value in counts] == ["0", "950", "1 K", "1.5 K", "12.3 M", "4 G", "1.2 T"]
