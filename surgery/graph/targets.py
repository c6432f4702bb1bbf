"""Targets: resolves text such as `"attn.*,!head"` to sites or parameters; a term without a match is an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from surgery.common.errors import TargetError, nearest
from surgery.common.patterns import Matcher, matcher
from surgery.graph.ops import LINEAR
from surgery.graph.sites import Site

ROLE_ROOTS = ("attn", "mlp", "embed", "norm", "conv", "head", "linear")
# Families of roles that models also have as names of modules (`mixer.in_proj`): a term is a role if it matches one.
_MIXERS = ("attn", "linear_attn", "ssm")
_ROOTS_AND_NAMES = ("linear_attn", "ssm", "mixer")
_OPERANDS = ("q", "k", "v", "qk", "qv", "kv", "qkv")
# Every role that surgery.graph.analysis.roles assigns. A pass of a plugin may assign others.
ROLES = (
    *(f"attn.{operand}{factor}" for operand in _OPERANDS for factor in ("", ".a", ".b")),
    "attn.out", "attn.bias", "attn.mix", "attn.gate",
    *(f"linear_attn.{operand}" for operand in _OPERANDS),
    *(f"linear_attn.{name}{factor}" for name in ("decay", "beta", "gate") for factor in ("", ".a", ".b")),
    "linear_attn.out", "ssm.in", "ssm.out", "ssm.x", "ssm.dt",
    "mlp.up", "mlp.gate", "mlp.down", "mlp.gate_up", "mlp.router",
    "embed", "embed.token", "embed.position", "embed.type", "embed.patch",
    "head", "head.dense", "norm", "conv", "linear",
)  # fmt: skip
ALL = ("all", "**")
# "cross.q" is the role attn.q in cross-attentions.
CROSS = "cross"
_FEW_WILDCARDS = 3
_LONGEST = 600  # characters of one term


@dataclass(frozen=True)
class Term:
    """One comma-separated term of a target."""

    text: str
    exclude: bool
    # One of: role, path, re, op, all, all-linear.
    reading: str
    pattern: Matcher
    # True for "cross.q": only projections of cross-attentions.
    cross: bool = False

    def matches_path(self, *names: str) -> bool:
        return any(self.pattern.fullmatch(name) for name in names if name)

    def matches_role(self, role: str) -> bool:
        return bool(role) and bool(self.pattern.fullmatch(role))


def parse(target: str) -> list[Term]:
    """Split a target into terms.

    Raises:
        TargetError: if the target is empty or malformed.
    """
    terms = []
    for raw in target.split(","):
        text = raw.strip()
        exclude = text.startswith("!")
        body = text[1:].strip() if exclude else text
        if len(text) > _LONGEST:
            raise TargetError(
                f"target {text[:60]!r}… has a part of {len(text)} characters; names are shorter"
            )
        if not body:
            raise TargetError(
                f"target {target[:200]!r} has an empty part; write names separated by single commas"
            )
        reading, colon, rest = body.partition(":")
        if colon and reading not in ("role", "path", "re", "op"):
            raise TargetError(f"target {body!r}: unknown prefix {reading!r}; use role:, path:, re: or op:")
        if not colon:
            rest = body
            if body in ALL:
                reading = "all"
            elif body == "all-linear":
                reading = "all-linear"
            else:
                reading = _reading(body)
        named = _of_cross(rest) if reading == "role" or (reading == "path" and not colon) else None
        if named is not None:
            terms.append(Term(body, exclude, "role", _compile("role", named, body), cross=True))
            continue
        terms.append(Term(body, exclude, reading, _compile(reading, rest, body)))
    # A target of exclusions alone ("!head") selects everything else.
    if all(term.exclude for term in terms):
        terms.insert(0, Term("all", False, "all", re.compile(".*")))
    return terms


def _reading(body: str) -> str:
    """Tell whether a term without a prefix is a role or a path."""
    root = re.split(r"[.*]", body)[0]
    if root in _ROOTS_AND_NAMES:
        pattern = _compile("role", body, body)
        return "role" if any(pattern.fullmatch(role) for role in ROLES) else "path"
    return "role" if root in ROLE_ROOTS else "path"


def _of_cross(text: str) -> str | None:
    """The role of attentions that "cross.q" or "cross" names; None if it names no role, but a path."""
    first, dot, rest = text.partition(".")
    if first != CROSS:
        return None
    role = f"attn.{rest}" if dot else "attn"
    pattern = _compile("role", role, text)
    return role if any(pattern.fullmatch(known) for known in ROLES) else None


def _compile(reading: str, pattern: str, shown: str) -> Matcher:
    if reading in ("all", "all-linear"):
        return re.compile(".*")
    if reading == "re":
        whole = rf".*(?:{pattern}).*"
        try:
            return matcher(whole)
        except ValueError:
            pass  # lookaround and backreferences have no automaton; recipes may not use them
        try:
            return re.compile(whole)
        except (re.error, OverflowError, RecursionError) as error:
            raise TargetError(f"target {shown!r} is not a valid regular expression: {error}") from None
    mixers = ""
    if reading == "role" and (pattern == "mixer" or pattern.startswith("mixer.")):
        # Every layer that mixes the positions, whatever it is.
        mixers, pattern = f"(?:{'|'.join(_MIXERS)})", pattern.removeprefix("mixer")
    body = mixers + "".join(
        ".*" if piece == "**" else "[^.]*" if piece == "*" else "[^.]" if piece == "?" else re.escape(piece)
        for piece in re.split(r"(\*\*|\*|\?)", pattern)
    )
    # Several wildcards backtrack for a long time on a name that does not match.
    compiled = re.compile if len(re.findall(r"\*\*|\*", pattern)) <= _FEW_WILDCARDS else _automaton
    if reading == "op":
        return compiled(rf".*(?:{body}).*")
    # A path may omit its leading components, a role may not. Both also select everything below them.
    left = "" if reading == "role" else r"(?:.*\.)?"
    return compiled(rf"{left}{body}(?:\..*)?")


def _automaton(pattern: str) -> Matcher:
    try:
        return matcher(pattern)
    except ValueError as error:
        raise TargetError(f"target with many wildcards: {error}; use fewer") from None


def check_roles(target: str) -> None:
    """Check, without a model, that each term that is read as a role can match one.

    Raises:
        TargetError: a term names no role of surgery, or the target is malformed.
    """
    for term in parse(target):
        if term.reading == "role" and not any(term.matches_role(role) for role in ROLES):
            name = term.text.removeprefix("role:")
            hint = nearest(name, ROLES) or f"; roles are {', '.join(ROLES)}"
            path = "" if term.text.startswith("role:") else f"; for a name in the model write path:{name}"
            raise TargetError(f"target {term.text!r} is no role{hint}{path}")


def _site_matches(term: Term, site: Site) -> bool:
    if term.reading == "all":
        return True
    if term.reading == "all-linear":
        return site.kind == LINEAR and not site.role.startswith("head")
    if term.reading == "role":
        return term.matches_role(site.role) and (site.cross or not term.cross)
    if term.reading == "op":
        return term.matches_path(site.op)
    modules = {call.module_path for call in site.calls}
    return term.matches_path(site.path, site.weight or "", *modules)


def _part_matches(term: Term, site: Site) -> tuple[str, ...]:
    """Return the parts of a fused projection that a role term names, such as `attn.q` on `attn.qkv`."""
    if term.reading != "role" or not site.parts or (term.cross and not site.cross):
        return ()
    family = site.role.rpartition(".")[0]
    return tuple(part for part in site.parts if term.matches_role(f"{family}.{part}"))


def select_sites(sites: Sequence[Site], target: str) -> list[Site]:
    """Return the sites that a target selects, in graph order, with selected parts of fused projections set.

    Raises:
        TargetError: if a term matches no site. The message lists the nearest candidates.
    """
    chosen: dict[str, Site] = {}
    for term in parse(target):
        hit = False
        for site in sites:
            ident = f"{site.key}"
            whole, parts = _site_matches(term, site), _part_matches(term, site)
            if not whole and not parts:
                continue
            hit = True
            if term.exclude:
                _exclude(chosen, ident, whole, parts)
            elif whole:
                chosen[ident] = replace(site, selected_parts=())
            else:
                before = chosen.get(ident)
                if before is None or before.selected_parts:
                    kept = before.selected_parts if before else ()
                    chosen[ident] = replace(site, selected_parts=tuple(dict.fromkeys(kept + parts)))
        if not hit:
            raise TargetError(_miss(term, sites))
    if not chosen:
        raise TargetError(f"target {target!r} excludes everything it selects")
    return [chosen[f"{site.key}"] for site in sites if f"{site.key}" in chosen]


def _exclude(chosen: dict[str, Site], ident: str, whole: bool, parts: tuple[str, ...]) -> None:
    site = chosen.get(ident)
    if site is None:
        return
    left = tuple(p for p in (site.selected_parts or tuple(site.parts)) if p not in parts)
    if whole or not left:
        del chosen[ident]
    else:
        chosen[ident] = replace(site, selected_parts=left)


def _miss(term: Term, sites: Sequence[Site]) -> str:
    roles = list(dict.fromkeys(site.role for site in sites if site.role))
    if term.cross:
        own = sorted({site.role.replace("attn", CROSS, 1) for site in sites if site.cross})
        there = f"there are {', '.join(own)}" if own else "the model has no cross-attention"
        return f"target {term.text!r} matches no site; {there}"
    if term.reading == "role":
        there = nearest(term.text, roles) or f"; the model has the roles {', '.join(roles) or 'none'}"
        as_path = replace(term, reading="path", pattern=_compile("path", term.text, term.text))
        also = [site.path for site in sites if _site_matches(as_path, site)]
        if also:
            there += f" (as a path it would match {len(also)} sites: write path:{term.text})"
        return f"target {term.text!r} is a role and matches no site{there}"
    tails = [".".join(site.path.split(".")[-n:]) for site in sites for n in (1, 2, 3)]
    there = nearest(term.text.removeprefix("path:"), [*tails, *roles]) or _sample(tails)
    return f"target {term.text!r} matches no site{there}"


def _sample(names: Iterable[str]) -> str:
    some = list(dict.fromkeys(names))[:6]
    return f"; there are {', '.join(some)}, …" if some else "; the model has no sites"


def select_parameters(
    parameters: Sequence[str],
    roles: dict[str, str],
    target: str,
    aliases: Callable[[str], tuple[str, ...]],
    cross: Collection[str] = (),
) -> tuple[str, ...]:
    """Return the names of the parameters that a target selects.

    Args:
        parameters: parameter names to choose from.
        roles: role of each parameter's site, for weights and biases.
        target: target text.
        aliases: all names of a parameter's tensor, given one of them.
        cross: parameters of projections of cross-attentions.

    Raises:
        TargetError: if a term matches no parameter or is an op term.
    """
    chosen: dict[str, None] = {}
    for term in parse(target):
        if term.reading == "op":
            raise TargetError(f"target {term.text!r}: parameters have no op; use a path or a role")
        hit = []
        for name in parameters:
            names = aliases(name)
            if (
                term.reading == "all"
                or (
                    term.reading == "role"
                    and any(
                        term.matches_role(roles.get(n, "")) and (n in cross or not term.cross) for n in names
                    )
                )
                or (term.reading in ("path", "re") and term.matches_path(*names))
                or (
                    term.reading == "all-linear" and roles.get(name, "").startswith(("attn", "mlp", "linear"))
                )
            ):
                hit.append(name)
        if not hit:
            tails = [".".join(name.split(".")[-n:]) for name in parameters for n in (1, 2, 3)]
            known = [*dict.fromkeys(roles.values())] if term.reading == "role" else tails
            raise TargetError(
                f"target {term.text!r} matches no parameter{nearest(term.text, known) or _sample(known)}"
            )
        for name in hit:
            if term.exclude:
                chosen.pop(name, None)
            else:
                chosen[name] = None
    return tuple(name for name in parameters if name in chosen)


def readings_differ(sites: Sequence[Site], target: str) -> list[str]:
    """Return a note for every role term that would select other sites if it were read as a path."""
    notes = []
    for term in parse(target):
        if term.reading != "role" or term.text.startswith("role:") or term.cross:
            continue
        as_path = replace(term, reading="path", pattern=_compile("path", term.text, term.text))
        by_role = {site.path for site in sites if _site_matches(term, site) or _part_matches(term, site)}
        by_path = {site.path for site in sites if _site_matches(as_path, site)}
        if by_path and by_path != by_role:
            notes.append(
                f"{term.text!r} is read as a role ({len(by_role)} sites); as a path it would select "
                f"{len(by_path)} (path:{term.text})"
            )
    return notes
