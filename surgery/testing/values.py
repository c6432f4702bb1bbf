"""Checks of outputs: at insertion, with random parameters, with two applications, and after undo."""

from __future__ import annotations

from surgery.common.errors import PassError
from surgery.engine.base import hash_graph
from surgery.engine.contract.base import RewritePass
from surgery.engine.contract.observe import observe
from surgery.testing.case import Case, Skip, fingerprint


def numerics(case: Case) -> str:
    """Inserting the pass changes the outputs by no more than it declares."""
    seen = case.compare(case.program, case.adapted, more=True)
    declared = case.declared
    if not seen.within(declared):
        raise case.error(
            "numerics",
            f"declares {declared}, but inserting it moves the outputs by {seen.difference:.1e} of their scale",
            _culprit(case),
        )
    return f"{declared}; {seen} on {len(case.inputs)} sets of inputs"


def _culprit(case: Case) -> str:
    """Path of the first site where the pass alone changes the outputs by more than it declares, or ""."""
    for planned in case.accepted:
        alone = case.apply(case.program, case.on_one_site(planned.site))
        if not case.compare(case.program, alone, more=True).within(case.declared):
            return planned.site.path
    return ""


def effect(case: Case) -> str:
    """Random parameters change the outputs; otherwise later checks would compare nothing."""
    _ = case.rewrite
    if not case.trainable:
        return "nothing it inserts trains"
    if not case.moved > 1e-4:
        raise case.error(
            "effect",
            f"random parameters move the outputs by {case.moved:.1e} of their scale; the inserted part does not "
            "reach the outputs, or scale is too small",
        )
    return f"random parameters move the outputs by {case.moved:.1e} of their scale"


def second(case: Case) -> str:
    """The same label is refused; a second application works on top of the first, and undoing it restores the first."""
    label = "again"
    while any(e.label == label for e in case.program.journal):
        label += "_"
    again = case.pass_.model_copy(update={"label": label})
    if isinstance(case.pass_, RewritePass):
        try:
            case.adapted.apply(case.pass_, verify=False)
        except PassError:
            pass
        else:
            raise case.error("second", f"a second {case.pass_.entry_id!r} was accepted")
        once = case.once_only(again)
        if once:
            raise Skip(once)
    both = case.apply(case.random, again)
    seen = case.compare(case.random, both, more=True)
    if not seen.within(case.declared):
        raise case.error(
            "second",
            f"declares {case.declared}, but on top of itself it moves the outputs by {seen.difference:.1e}",
        )
    shared = set(case.entry.tensor_names) & set(both.journal.entries[-1].tensor_names)
    if shared:
        raise case.error("second", f"both applications use the tensor {sorted(shared)[0]}")
    case.randomise(both, both.journal.entries[-1])
    if not case.compare(case.random, both.undo(again.entry_id)).equal:
        raise case.error("second", "undoing the second application does not restore the first")
    return f"{seen} on top of the first"


def undo(case: Case) -> str:
    """undo restores the program bit for bit, undo_all the base."""
    undone = case.random.undo(case.entry.id)
    now = {name: fingerprint(t) for name, t in undone.state().items()}
    if now != case.before:
        differing = sorted(n for n in {*now, *case.before} if now.get(n) != case.before.get(n))
        raise case.error("undo", f"{differing[0]} is not restored ({len(differing)} tensors differ)")
    if hash_graph(undone.graph) != case.graph_hash:
        raise case.error("undo", "the graph is not restored")
    if not observe(case.reference, undone.run()).equal:
        raise case.error("undo", "the outputs are not restored bit for bit")
    base = case.random.undo_all()
    now = {name: fingerprint(t) for name, t in base.state().items()}
    if now != case.base_before or hash_graph(base.graph) != case.base_hash:
        raise case.error("undo", "undo_all does not restore the base bit for bit")
    return f"{len(now)} tensors and {len(undone.graph.nodes)} nodes, bit for bit"


def unchanged(case: Case) -> str:
    """The given program and its base are unchanged after all other checks."""
    program, _ = case.program, case.random
    for what, was, tensors in (
        ("program", case.before, program.state()),
        ("base", case.base_before, program.base.tensors),
    ):
        for name, tensor in tensors.items():
            if fingerprint(tensor) != was[name]:
                raise case.error("input", f"{name} of the {what} that the pass was applied to has changed")
    if hash_graph(program.graph) != case.graph_hash:
        raise case.error("input", "the graph of the program that the pass was applied to has changed")
    if hash_graph(program.base.captured.graph) != case.base_hash:
        raise case.error("input", "the captured graph of the base has changed")
    if not observe(case.reference, program.run()).equal:
        raise case.error("input", "outputs of the program that the pass was applied to have changed")
    return f"{len(case.base_before)} tensors, bit for bit"
