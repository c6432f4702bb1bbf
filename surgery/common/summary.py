"""Summaries of objects: as text for a terminal, and as HTML for a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Summary:
    """Title of an object, with facts and a table.

    Attributes:
        title: First line.
        facts: (name, value) pairs.
        columns: Titles of the table's columns.
        rows: Rows of the table.
    """

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()

    def text(self) -> str:
        """The summary as lines of text."""
        lines = [self.title, *(f"  {name}: {value}" for name, value in self.facts)]
        if self.rows:
            table = (self.columns, *self.rows)
            widths = [max(len(row[place]) for row in table) for place in range(len(self.columns))]
            lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        return "\n".join(lines)

    def html(self) -> str:
        """The summary as an HTML fragment. Names come from files, so all text is escaped."""
        parts = [f"<div><strong>{escape(self.title)}</strong>"]
        if self.facts:
            cells = (
                f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in self.facts
            )
            parts.append(f"<table>{''.join(cells)}</table>")
        if self.rows:
            head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
            body = "".join(
                f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows
            )
            parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
        return "".join(parts) + "</div>"
