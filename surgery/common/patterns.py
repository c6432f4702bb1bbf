"""Regular expressions from files, matched in time linear in the name.

Python's `re` backtracks: `(a+)+$` on thirty letters takes minutes. A pattern with repeats or alternatives is therefore
run as an automaton (Thompson 1968), which keeps the set of all states it may be in. Lookaround and backreferences have
no such form and are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

_LONGEST = 512  # characters of a pattern
_MOST = 4096  # states of an automaton, after counted repeats are written out
_DEEPEST = 24  # nesting of groups
# Without repeats and alternatives `re` needs no backtracking, and is faster.
_SIMPLE = re.compile(r"(?:[\w\-]|\\?\.|\\[_\-])*")
_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "D": lambda c: not c.isdecimal(),
    "w": lambda c: c.isalnum() or c == "_",
    "W": lambda c: not (c.isalnum() or c == "_"),
    "s": str.isspace,
    "S": lambda c: not c.isspace(),
}

_Test = Callable[[str], bool]
_Node = tuple  # ("char", test) | ("cat", nodes) | ("or", nodes) | ("repeat", node, low, high) | ("start",) | ("end",)


class Matcher(Protocol):
    """What matches whole names: a compiled regular expression or an automaton."""

    def fullmatch(self, name: str, /) -> object: ...


class Automaton:
    """A regular expression that is matched without backtracking.

    Args:
        pattern: literals, `.`, classes, `\\d \\w \\s`, groups, `|`, `* + ? {m,n}`, `^` and `$`.

    Raises:
        ValueError: the pattern is malformed, too long, or uses anything else.
    """

    def __init__(self, pattern: str) -> None:
        tree = _Parser(pattern).parse()
        # A state is a test with one successor, an assertion with one successor, or a branch with several.
        self._tests: list[_Test | None] = []
        self._at: list[str] = []
        self._next: list[list[int]] = []
        self._end = self._add()
        self._begin = self._build(tree, self._end)

    def fullmatch(self, name: str, /) -> bool:
        """True if the pattern matches the whole name."""
        states = self._reach([self._begin], 0, len(name))
        for position, character in enumerate(name, 1):
            moved = []
            for state in states:
                test = self._tests[state]
                if test is not None and test(character):
                    moved += self._next[state]
            states = self._reach(moved, position, len(name))
            if not states:
                return False
        return self._end in states

    def _reach(self, states: list[int], position: int, length: int) -> set[int]:
        """The states and all that follow without reading a character."""
        seen: set[int] = set()
        while states:
            state = states.pop()
            if state in seen:
                continue
            seen.add(state)
            at = self._at[state]
            if self._tests[state] is None and not (
                (at == "start" and position) or (at == "end" and position < length)
            ):
                states = states + self._next[state]
        return seen

    def _add(self, following: list[int] | None = None, test: _Test | None = None, at: str = "") -> int:
        if len(self._next) >= _MOST:
            raise ValueError("it repeats too much")
        self._tests.append(test)
        self._at.append(at)
        self._next.append(following or [])
        return len(self._next) - 1

    def _build(self, node: _Node, following: int) -> int:
        """Add the states of a node before `following`; return the first."""
        kind = node[0]
        if kind == "char":
            return self._add([following], node[1])
        if kind in ("start", "end"):
            return self._add([following], at=kind)
        if kind == "cat":
            for part in reversed(node[1]):
                following = self._build(part, following)
            return following
        if kind == "or":
            return self._add([self._build(part, following) for part in node[1]])
        _, part, low, high = node
        if high is None:
            entry = self._add()
            self._next[entry] = [self._build(part, entry), following]
        else:
            entry = following
            for _ in range(high - low):
                entry = self._add([self._build(part, entry), following])
        for _ in range(low):
            entry = self._build(part, entry)
        return entry


class _Parser:
    def __init__(self, text: str) -> None:
        if len(text) > _LONGEST:
            raise ValueError(f"it is longer than {_LONGEST} characters")
        self.text, self.at, self.depth = text, 0, 0

    def parse(self) -> _Node:
        tree = self._alternatives()
        if self.at < len(self.text):
            raise ValueError(f"{self.text[self.at]!r} at position {self.at} closes nothing")
        return tree

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _take(self, expected: str = "") -> str:
        found = self._peek()
        if not found or (expected and found != expected):
            raise ValueError(f"it lacks {expected or 'a character'!r} at position {self.at}")
        self.at += 1
        return found

    def _alternatives(self) -> _Node:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise ValueError("its groups are nested too deeply")
        branches = [self._sequence()]
        while self._peek() == "|":
            self._take()
            branches.append(self._sequence())
        self.depth -= 1
        return branches[0] if len(branches) == 1 else ("or", branches)

    def _sequence(self) -> _Node:
        parts: list[_Node] = []
        while self._peek() and self._peek() not in "|)":
            parts.append(self._repeated(self._atom()))
        return ("cat", parts)

    def _atom(self) -> _Node:
        character = self._take()
        if character == "(":
            if self._peek() == "?":
                self._take()
                if self._take() != ":":
                    raise ValueError("it uses (?…), of which only (?:…) is supported")
            inner = self._alternatives()
            self._take(")")
            return inner
        if character == "^":
            return ("start",)
        if character == "$":
            return ("end",)
        if character in "*+?{":
            raise ValueError(f"{character!r} at position {self.at - 1} repeats nothing")
        if character == ".":
            return ("char", lambda c: c != "\n")
        if character == "[":
            return ("char", self._class())
        return ("char", self._escape() if character == "\\" else character.__eq__)

    def _escape(self) -> _Test:
        character = self._take()
        if character in _CLASSES:
            return _CLASSES[character]
        if character.isalnum():
            raise ValueError(f"it uses \\{character}, which is not supported")
        return character.__eq__

    def _class(self) -> _Test:
        negated = self._peek() == "^" and bool(self._take())
        tests: list[_Test] = []
        while self._peek() != "]" or not tests:
            low = self._take()
            if low == "\\":
                tests.append(self._escape())
                continue
            if self._peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self._take()
                high = self._take()
                if high == "\\" or high < low:
                    raise ValueError(f"the range {low}-{high} is not supported")
                tests.append(lambda c, low=low, high=high: low <= c <= high)  # type: ignore[misc]
            else:
                tests.append(low.__eq__)
        self._take("]")
        return lambda c: any(test(c) for test in tests) is not negated

    def _repeated(self, node: _Node) -> _Node:
        bounds = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        counted = re.compile(r"\{(\d{1,3})(?:(,)(\d{0,3}))?\}").match(self.text, self.at)
        if counted is not None:
            self.at = counted.end()
            low = int(counted[1])
            high = low if not counted[2] else int(counted[3]) if counted[3] else None
            if high is not None and high < low:
                raise ValueError(f"{counted[0]} has its bounds in the wrong order")
        elif self._peek() and self._peek() in bounds:
            low, high = bounds[self._take()]
        else:
            return node
        if self._peek() == "?":  # a lazy repeat matches the same names
            self._take()
        if self._peek() and self._peek() in "*+?{":
            raise ValueError(f"a repeat of a repeat at position {self.at} is not supported")
        return ("repeat", node, low, high)


@lru_cache(maxsize=4096)
def matcher(pattern: str) -> Matcher:
    """A matcher of whole names for a regular expression from a file, which cannot take long.

    Raises:
        ValueError: the pattern is malformed, or of a form that has no automaton.
    """
    if len(pattern) <= _LONGEST and _SIMPLE.fullmatch(pattern):
        return re.compile(pattern)
    return Automaton(pattern)
