"""The pages in headless Chromium: clicks, keys, search, themes, no errors in the console; screenshots are kept."""

from __future__ import annotations

import dataclasses

import pytest

from surgery.export.show.compare import compare
from surgery.export.show.model import model_data
from surgery.export.show.page import page
from tests.export.show.test_page import hostile

ENTER, ESCAPE, DOWN, UP, LEFT, RIGHT = "\ue007", "\ue00c", "\ue015", "\ue013", "\ue012", "\ue014"
# Of a page that was written on this machine and is opened from a file. The issue asks for less than a second; the
# tests have one core of a loaded machine, so a slow start of the browser must not fail them.
LONGEST = 3.0


@pytest.fixture
def show(browser, tmp_path):
    def opened(data):
        (tmp_path / "page.html").write_text(page(data), "utf-8")
        browser.open(tmp_path / "page.html")
        assert browser.errors() == []
        return browser

    return opened


def test_view(show, changed):
    b = show(model_data(changed, "tiny llama"))
    ready = b.run("return performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd / 1000")
    assert ready < LONGEST
    assert b.run("return document.title") == "tiny llama"
    names = b.texts("#tree .row .name")
    assert names[:3] == ["LlamaForCausalLM", "model", "embed_tokens"]
    # LoRA is on the second layer alone, so the layers are not equal.
    assert "layers.0" in names
    assert "layers.1" in names
    b.click("#graph .box", "model")
    b.click("#graph .box", "layers.1")
    assert b.texts("#crumbs b") == ["layers.1"]
    boxes = b.texts("#graph .box text.name")
    assert {"self_attn", "mlp", "input_layernorm"} <= set(boxes)
    b.click("#graph .box", "self_attn")
    details = b.texts("#details")[0]
    assert "LlamaAttention" in details
    b.click("#graph .box", "q_proj")
    b.click("#graph .box", "addmm")
    details = b.texts("#details")[0]
    assert "by passlora" in details
    assert "at sitemodel.layers.1.self_attn.q_proj" in details
    b.screenshot("view-light")
    b.keys("t")
    assert b.run("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
    b.screenshot("view-dark")
    b.keys("u")
    assert b.texts("#crumbs b") == ["self_attn"]
    # A press on the breadcrumb goes up.
    b.click("#crumbs a", "model")
    assert b.texts("#crumbs b") == ["model"]
    b.driver.back()
    assert b.texts("#crumbs b") == ["self_attn"]
    assert b.errors() == []


def test_equal_blocks_are_folded_in_tree_and_graph(show, llama):
    b = show(model_data(llama, "tiny llama"))
    assert "layers.0–1" in b.texts("#tree .name")
    assert "×2" in b.texts("#tree .times")
    b.click("#tree .row", "model")
    assert any("×2" in text for text in b.texts("#graph text.name"))
    b.click("#tree .row", "embed_tokens")
    assert "tied to lm_head.weight" in b.texts("#details")[0]
    b.click("#tree .row", "model")
    b.click("#graph .box", "layers.0–1")
    assert b.texts("#crumbs b") == ["layers.0"]
    b.keys("]")
    assert b.texts("#crumbs b") == ["layers.1"]
    b.click("#graph .box", "mlp")
    b.keys("[")
    assert b.run("return opened.path") == "model.layers.0.mlp"
    before = len(b.texts("#graph .box"))
    b.click("#tree .row", "self_attn")
    shown = len(b.texts("#graph .box"))
    b.keys("s")
    assert before != shown > len(b.texts("#graph .box")) > 5
    assert "scaled_dot_product_attention" in b.texts("#graph text.name")
    assert b.errors() == []


def test_search_and_keys(show, llama):
    b = show(model_data(llama, "tiny llama"))
    b.keys("/", *"mlp.down")
    results = b.texts("#results .name")
    assert results
    b.keys(DOWN, UP, ENTER)
    assert b.texts("#crumbs b") == ["down_proj"]
    assert "mlp.down" in b.texts("#details")[0]
    b.keys("/", *"no such thing")
    assert b.texts("#results") == ["nothing of this name"]
    b.keys(ESCAPE)
    # The tree: down and up move, right unfolds or goes in, left folds or goes out.
    b.click("#tree .row .name", "LlamaForCausalLM")
    b.run("document.getElementById('tree').focus()")
    b.keys(RIGHT)
    assert b.run("return opened.path") == "model"
    b.keys(DOWN)
    assert b.run("return opened.path") == "model.embed_tokens"
    b.keys(UP, LEFT)
    assert b.run("return unfolded.has(opened)") is False
    b.keys(LEFT)
    assert b.run("return opened.path") == ""
    scale = b.run("return view.scale")
    b.keys("+")
    assert b.run("return view.scale") == pytest.approx(1.25 * scale)
    b.keys("?")
    assert b.run("return document.getElementById('keys').open") is True
    b.keys(ESCAPE)
    assert b.errors() == []


def test_difference(show, llama, changed):
    b = show(compare(llama, changed, ("llama", "int4 and LoRA")))
    bars = b.run(
        "return [...document.querySelectorAll('#strip button')]"
        ".map((bar) => [bar.title.split(':')[0], bar.firstChild.clientHeight])"
    )
    heights = dict(bars)
    assert heights["model.embed_tokens"] == 0
    assert heights["model.layers.0"] > 10
    assert "The first to move is model.layers.0" in b.texts("#strip .what")[0]
    b.run("document.querySelectorAll('#strip button')[3].click()")
    assert b.run("return opened.path") == "model.layers.1"
    b.screenshot("diff-light")
    b.click("#graph .box", "self_attn")
    b.click("#graph .box", "q_proj")
    assert len(b.texts("#graph .box.plus")) > 1
    b.keys("t")
    b.screenshot("diff-dark")
    assert b.errors() == []


def test_hostile_names_are_only_text(show):
    b = show(hostile())
    b.click("#tree .row", "</script>")
    b.keys("/", *"onerror", ENTER)
    for row in range(3):
        b.run("document.querySelectorAll('#tree .row')[arguments[0]]?.click()", row)
        b.run("document.querySelector('#graph .box')?.dispatchEvent(new MouseEvent('click'))")
    assert b.run("return window.hacked") is None
    assert b.run("return document.images.length") == 0
    assert b.errors() == []


def test_a_module_with_thousands_of_ops_is_shown_in_parts(show, llama):
    data = model_data(llama, "long")
    op = dataclasses.replace(data.ops[5], module="", inputs=(), weights=())
    ops = [dataclasses.replace(op, id=f"op{i}", inputs=(f"op{i - 1}",) if i else ()) for i in range(2000)]
    b = show(dataclasses.replace(data, ops=tuple(ops), weights={}))
    assert len(b.texts("#graph .box.op")) == 300
    assert "boxes 1–300 of 2000" in b.texts("#pager")[0]
    b.keys("/", *"op1234", ENTER)
    assert "boxes 1201–1500 of 2000" in b.texts("#pager")[0]
    assert b.errors() == []
