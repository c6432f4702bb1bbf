"""Summaries: aligned text, and HTML that no name can break out of."""

from __future__ import annotations

from html.parser import HTMLParser

from surgery.common.summary import Summary

SUMMARY = Summary(
    "<script>alert(1)</script>",
    (("a & b", '"><img src=x onerror=alert(1)>'),),
    ("site", "adds"),
    (("layers.0–3.q ×4", "12"), ("<b>", "5")),
)


def test_columns_are_aligned():
    title, fact, head, first, second = SUMMARY.text().splitlines()
    assert (title, fact) == (SUMMARY.title, '  a & b: "><img src=x onerror=alert(1)>')
    assert head.index("adds") == first.index("12") == second.index("5")


def test_names_are_escaped_in_html():
    tags, texts = set(), []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.add(tag)
            assert not attrs

        def handle_data(self, data):
            texts.append(data)

    Reader().feed(SUMMARY.html())
    assert tags == {"div", "strong", "table", "thead", "tbody", "tr", "th", "td"}
    assert texts == [SUMMARY.title, *SUMMARY.facts[0], "site", "adds", *SUMMARY.rows[0], *SUMMARY.rows[1]]
