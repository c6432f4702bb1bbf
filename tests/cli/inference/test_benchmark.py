"""Benchmarks: every form in one table, figures of each, in turns, and a page without a network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from rich.console import Console

from surgery.cli.benchmark_page import benchmark_page
from surgery.cli.inference.benchmark import Benchmark, Figures, _in_turns
from tests.cli.inference.conftest import refused, run

FAST = ("--rounds", 2)


def test_every_form(forms, tmp_path):
    page = tmp_path / "b.html"
    models = (forms.trained, forms.hf, forms.onnx)
    found = json.loads(
        run("benchmark", *models, "--data", forms.test, *FAST, "--threads", 1, "--json", "--html", page)
    )
    assert (found["rounds"], found["threads"], found["metric"]) == (2, 1, "accuracy")
    saved, hf, onnx = found["models"]
    for each in found["models"]:
        # The three forms predict the same classes, see test_evaluate.
        assert each["quality"] == pytest.approx(forms.printed["metrics"]["accuracy"])
        assert set(each["latency"]) == {"1", "16"}
        assert all(seconds > 0 for seconds in each["latency"].values())
        assert each["tokens_per_second"] is None
    assert onnx["bytes"] == forms.onnx.stat().st_size
    # The weights and the configuration that transformers reads.
    assert hf["bytes"] == sum(
        (forms.hf / name).stat().st_size for name in ("config.json", "model.safetensors")
    )
    # A saved directory counts the tensors that it reads; the merged file has nearly as many.
    assert saved["bytes"] == pytest.approx(hf["bytes"], rel=0.1)
    assert page.read_text().count("<circle") == 6


def test_tokens_per_second(llama_folder):
    found = json.loads(run("benchmark", llama_folder, *FAST, "--new-tokens", 4, "--length", 8, "--json"))
    (only,) = found["models"]
    assert only["tokens_per_second"] > 0
    assert only["quality"] is None
    assert found["metric"] is None
    assert "tokens/s" not in run("benchmark", llama_folder, *FAST, "--new-tokens", 0, "--length", 8)


def test_the_table_fits_80_columns(forms, tmp_path, monkeypatch):
    """In a terminal of 80 columns. The names of models are folded, no figure is cut."""
    narrow = Console(width=80, highlight=False, markup=False, file=None)
    monkeypatch.setattr("surgery.cli.benchmarks.console", lambda: narrow)
    printed = run("benchmark", forms.hf, forms.onnx, "--data", forms.test, *FAST)
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in printed
    assert lines[0].split() == ["model", "size", "batch", "1", "batch", "16", "accuracy"]
    assert re.search(r"\d\.\d\d×", printed)
    assert "rounds in turns" in printed


def test_models_run_in_turns():
    seen: list[int] = []
    times = _in_turns([lambda n=n: seen.append(n) for n in range(3)], 3, 1, "turns")
    # After the warm-up each round begins with another model.
    assert seen == [0, 1, 2, 0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert [len(each) for each in times] == [3, 3, 3]


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "onerror", "onload")]


def benchmark_of(*names):
    latency = {1: 0.002, 16: 0.01}
    models = [
        Figures(name, "onnx", 1000 * (n + 1), latency, None, 0.9 - n / 10) for n, name in enumerate(names)
    ]
    return Benchmark(tuple(models), 3, 1, "random", metric="accuracy")


def test_the_page_has_no_network_and_no_foreign_markup():
    page = Page()
    name = '<img src=x onerror=alert(1)>"&'
    text = benchmark_page(benchmark_of(name, "b"))
    page.feed(text)
    assert "img" not in page.tags
    assert "script" not in page.tags
    assert page.links == []
    assert text.count("&lt;img src=x onerror=alert(1)&gt;&quot;&amp;") >= 3
    # Without a quality there is one plot, of size and latency; with one value only, axes still have a width.
    one = Benchmark((Figures("a", "onnx", 1, {1: 0.1, 16: 1.0}),), 1, 1, "random")
    assert benchmark_page(one).count("<svg") == 1
    assert "nan" not in benchmark_page(one)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_chromium_draws_the_page(tmp_path):
    (tmp_path / "b.html").write_text(benchmark_page(benchmark_of("a", "b")))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    done = subprocess.run(
        ["chromium", *options, (tmp_path / "b.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.count("<circle") == 4
    assert "Uncaught" not in done.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("HF", "nothing"), "nothing does not exist"),
        (("HF", "--data", "no.csv"), "there is no such file"),
        (("HF", "--objective", "classification"), "add --data"),
        (("HF", "--html", "TEST"), "exists; choose another --html"),
        (("HF", "--data", "TEST", "--objective", "causal-lm"), "cannot be judged as causal-lm"),
    ],
)
def test_wrong_input_is_one_line(forms, args, said):
    paths = {"HF": forms.hf, "TEST": forms.test}
    assert said in refused("benchmark", *(paths.get(arg, arg) for arg in args))
