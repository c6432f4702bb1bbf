"""What surgery keeps on a live module: its program, and which layers carry a class of ours."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from surgery.common.errors import PassError
from surgery.engine.base import Base
from surgery.engine.contract.base import Pass, RewritePass
from surgery.engine.module import get, register
from surgery.engine.program import Program
from surgery.engine.replay import live_entries, pass_of
from surgery.graph.ops import EXPERTS
from surgery.graph.sites import Site, SiteKey
from surgery.graph.view import View
from surgery.live.capture import Seen
from surgery.live.layer import LayerError, Layers, Piece, input_name

ATTRIBUTE = "_surgery_state"


class LiveState:
    """The program of a live model, over the model's own tensors.

    program: its base has the parameters as they were; of those that train, the model holds copies of its own (in
    `program.changed`), so that undoing is bit for bit. seen: what the example inputs did to each layer.
    uncaptured: why the model could not be captured, or empty.
    """

    def __init__(
        self, program: Program, seen: Mapping[str, Seen], layers: Layers, uncaptured: str = ""
    ) -> None:
        self.program = program
        self.seen = dict(seen)
        self.layers = layers
        self.uncaptured = uncaptured
        self.required = {
            n: t.requires_grad for n, t in program.base.tensors.items() if isinstance(t, nn.Parameter)
        }
        self._added: set[str] = set()
        self._block = ""
        self._hold(program.base)

    @contextlib.contextmanager
    def within(self, block: str) -> Iterator[None]:
        """While a block runs, whose end puts back what was before it."""
        before, self._block = self._block, block
        try:
            yield
        finally:
            self._block = before

    def free(self) -> None:
        """Raises PassError in such a block: what is changed there would be gone at its end."""
        if self._block:
            raise PassError(
                f"inside a `{self._block}` block the model is not changed, because the block's end puts back what "
                f"was before it; do this outside"
            )

    def _hold(self, base: Base) -> None:
        """Let planning on a base know what the live model cannot do."""
        base.hindrance = self.hindrance
        if self.uncaptured:  # every layer is an end of its own there, which says nothing of the model
            base.__dict__["view"] = View(
                base.captured.graph, base.names, base.plugins.weight_ops, known=({}, {})
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveState:
        """For a copy of the model: its tensors are the copies, the graph and the classes the same."""
        old = self.program.base
        module = copy.deepcopy(old.loaded.module, memo)
        base = Base(replace(old.loaded, module=module), old.captured, old.plugins, old.ref, old.options)
        tensors = {name: copy.deepcopy(t, memo) for name, t in self.program.tensors.items()}
        changed = {name: copy.deepcopy(t, memo) for name, t in self.program.changed.items()}
        fresh = LiveState.__new__(LiveState)
        fresh.program = Program(base, self.program.journal, tensors, changed)
        fresh.seen, fresh.layers, fresh.uncaptured = self.seen, self.layers, self.uncaptured
        fresh.required, fresh._added, fresh._block = dict(self.required), set(self._added), ""
        fresh._hold(base)
        return fresh

    # -- which passes and sites

    def refuse(self, passes: Iterable[Pass]) -> None:
        """Raises PassError for a pass that changes more than single layers."""
        for pass_ in passes:
            if isinstance(pass_, RewritePass) and not pass_.in_place:
                raise PassError(
                    f"{pass_.name} changes more than single layers, so a live model cannot hold it; apply it to the "
                    f"model's program: surgery.load('hf:…') or surgery.capture(model, inputs)"
                )

    def _layer(self, path: str) -> nn.Module:
        try:
            return self.program.base.loaded.module.get_submodule(path)
        except AttributeError:
            raise LayerError("a pass made it, and the live model has no such layer") from None

    def hindrance(self, site: Site) -> str | None:
        """Why a site of the program is none that can be rewritten in the live model, or None."""
        if site.kind == EXPERTS:
            return "its experts are one stacked tensor, which no layer of its own uses; capture the model for these"
        if site.weight is None:
            return None  # the pass has its own reason
        if self.uncaptured:
            return None
        problem = ""
        for path in self._owners(site.weight):
            try:
                layer = self._layer(path)
                input_name(layer)
                seen = self.seen.get(path)
                if seen is None:
                    raise LayerError("the model uses its weight without calling it")
                if seen.more:
                    raise LayerError(f"the model gives its forward {' and '.join(seen.more)} too")
                for rank, shape in seen.shapes.items():
                    if not self.layers.uses(layer, rank, shape, seen.dtype):
                        raise LayerError("its forward uses no weight")
            except LayerError as error:
                problem = problem or f"{path}: {error}"
                continue
            return None
        return f"it cannot be rewritten in place ({problem}); capture the model, and apply it to the program"

    def _users(self, key: SiteKey, named: set[tuple[str, str]]) -> list[str]:
        """Paths of the modules that may be the ones whose calls a site is: the one that it is named after, first; of
        a tied weight's other holders those that no other site is named after.

        named: kind and module of every site.
        """
        own = key.owner.rpartition(".")[0]
        return [path for path in self._owners(key.owner) if path == own or (key.kind, path) not in named]

    def _owners(self, name: str) -> list[str]:
        """Paths of the modules that hold a parameter, by every name that it has."""
        names = self.program.base.names.get(name, (name,))
        return list(dict.fromkeys(n.rpartition(".")[0] for n in names))

    # -- putting a program into the model

    def adopt(self, model: nn.Module, program: Program) -> None:
        """Let the model be what a program on the same base is. Every layer is made before any is changed.

        Raises PassError where the model is in shards, which other tensors would put an end to.
        """
        if any(is_shard(p) for p in model.parameters()):
            raise PassError(
                "the model's parameters are shards of several processes; change it before it is sharded, or save it "
                "and load what was saved"
            )
        pieces = self._pieces(program)
        classes = {path: self._class_of(model, path, own, program) for path, own in pieces.items()}
        self._put_tensors(model, program, pieces)
        wanted = {id(model.get_submodule(path)): cls for path, cls in classes.items()}
        for layer in model.modules():
            cls = wanted.get(id(layer)) or getattr(type(layer), "surgery_base", None)
            if cls is not None:
                layer.__class__ = cls
        self.program = program
        self._let_train(model)

    def classes(self, model: nn.Module, program: Program) -> dict[str, type[nn.Module]]:
        """The class that each layer which a program rewrites has to have, by path. Raises PassError."""
        return {
            path: self._class_of(model, path, own, program) for path, own in self._pieces(program).items()
        }

    def _pieces(self, program: Program) -> dict[str, list[Piece]]:
        found: dict[str, list[Piece]] = {}
        module = program.base.loaded.module
        named = {(key.kind, key.owner.rpartition(".")[0]) for key in program.base.sites.by_key}
        for entry in live_entries(program.journal):
            pass_ = pass_of(entry, program.base.plugins)
            assert isinstance(pass_, RewritePass)
            for record in entry.sites:
                owner = program.base.names.get(record.key.owner, (record.key.owner,))[0]
                done: set[int] = set()
                for path in self._users(record.key, named):
                    layer = module.get_submodule(path)
                    if id(layer) not in done and self._uses(path, layer, owner, record.key.kind):
                        done.add(id(layer))
                        found.setdefault(path, []).append(Piece(entry, pass_, record, owner))
                if not done:
                    raise PassError(
                        f"{entry.id} at {record.path}: the model uses its weight without calling a layer that holds "
                        f"it, so a live model cannot hold the pass there; leave the site out, or use the program itself"
                    )
        return found

    def _uses(self, path: str, layer: nn.Module, owner: str, kind: str) -> bool:
        """Whether the layer's own forward uses a weight in that way."""
        seen = self.seen.get(path)
        if seen is None and not self.uncaptured:
            return False  # the model reads the weight, and never calls the layer
        seen = seen or Seen()
        shapes = seen.shapes or ({3: ()} if isinstance(layer, nn.Linear) else {})
        attributes = [name for name, full in self._names(path, layer, self.program).items() if full == owner]
        try:
            used = [
                self.layers.uses(layer, rank, shape or None, seen.dtype) for rank, shape in shapes.items()
            ]
        except LayerError:
            return False
        return bool(used) and all(any((name, kind) in at for name in attributes) for at in used)

    def _names(self, path: str, layer: nn.Module, program: Program) -> dict[str, str]:
        """Attribute of a layer -> first name of that tensor in the program."""
        own = (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
        full = {name: f"{path}.{name}" if path else name for name, _ in own}
        return {name: program.base.names.get(known, (known,))[0] for name, known in full.items()}

    def _class_of(
        self, model: nn.Module, path: str, pieces: list[Piece], program: Program
    ) -> type[nn.Module]:
        layer = program.base.loaded.module.get_submodule(path)
        live = model.get_submodule(path)
        seen = self.seen.get(path, Seen())
        names = self._names(path, layer, program)
        for piece in pieces:
            for full in piece.record.tensors.values():
                names[local_name(path, full)] = full
        where = f"{pieces[-1].entry.id} at {pieces[-1].record.path}"
        if "forward" in vars(live):
            raise PassError(f"{where}: its forward was replaced on the instance; remove that (a hook?) first")
        try:
            return self.layers.adapted(layer, pieces, names, program.tensors, seen.shapes, seen.dtype)
        except LayerError as error:
            raise PassError(f"{where}: {error}; capture the model, and apply it to the program") from None

    def _put_tensors(self, model: nn.Module, program: Program, pieces: Mapping[str, list[Piece]]) -> None:
        """Inserted tensors where the layers read them, base parameters as this program has them."""
        wanted: dict[str, Tensor] = {n: program.tensors[full] for n, full in self._places(pieces).items()}
        # What a layer does not read now stays where it is, while the program has it: it may be switched on again.
        held = {id(tensor) for tensor in program.tensors.values()}
        for name in self._added - set(wanted):
            there = get(model, name)
            if id(there) in held:
                wanted[name] = there
            else:
                _remove(model, name)
        for name, tensor in wanted.items():
            register(model, name, tensor, kind=Inserted)
        self._added = set(wanted)
        folded = program.folded()
        for name, group in program.base.names.items():
            if name != group[0]:
                continue
            value = program.changed.get(name, program.base.tensors[name])
            if name in folded:
                value = nn.Parameter(folded[name], requires_grad=False)
            for each in group:
                owner, _, leaf = each.rpartition(".")
                module = model.get_submodule(owner)
                if module._parameters[leaf] is not value:
                    module._parameters[leaf] = value  # type: ignore[assignment]

    def gather(self, model: nn.Module) -> bool:
        """Let the program have the values of what stands in the model in the place of its tensors: shards, in fully
        sharded training. Every process has to call it. Returns whether there were shards."""
        program, sharded = self.program, False
        at = self.places(program)
        own: dict[str, Tensor] = {n: t for n, t in program.changed.items() if isinstance(t, nn.Parameter)}
        own.update({name: program.tensors[name] for name in at})
        for name, tensor in own.items():
            there = get(model, at.get(name, name))
            if there is tensor:
                continue
            sharded = sharded or is_shard(there)
            with torch.no_grad():
                tensor.copy_(there.full_tensor() if is_shard(there) else there)
        return sharded

    def places(self, program: Program) -> dict[str, str]:
        """Name of an inserted tensor -> where a layer of the model holds it (the first, where several do)."""
        at: dict[str, str] = {}
        for place, full in self._places(self._pieces(program)).items():
            at.setdefault(full, place)
        return at

    def _places(self, pieces: Mapping[str, list[Piece]]) -> dict[str, str]:
        """Where the model holds an inserted tensor -> its name in the program."""
        places = {}
        for path, own in pieces.items():
            for full in dict.fromkeys(f for piece in own for f in piece.record.tensors.values()):
                local = local_name(path, full)
                places[f"{path}.{local}" if path else local] = full
        return places

    def _let_train(self, model: nn.Module) -> None:
        """Let require gradients what the program lets train; with an empty journal, what did before."""
        program = self.program
        for name, tensor in {**program.base.tensors, **program.tensors, **program.changed}.items():
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                bare = not program.journal.entries
                wants = self.required.get(name, True) if bare else program.trains(name, program.clock.step)
                if tensor.requires_grad != wants:
                    tensor.requires_grad_(wants)
        if program.schedule.masks:
            program.module()  # puts the hooks on what trains in part


def is_shard(tensor: Any) -> bool:
    """Whether a tensor is a part of one that several processes hold."""
    return hasattr(tensor, "full_tensor")


def local_name(path: str, full: str) -> str:
    """Where a layer holds a tensor of the program: under its own path, or under the whole name, flattened, where the
    tensor is called by another name of a tied weight."""
    if not path:
        return full
    return (
        full.removeprefix(f"{path}.") if full.startswith(f"{path}.") else f"shared.{full.replace('.', '_')}"
    )


class Inserted(nn.Module):
    """The tensors that a pass added to a layer; the layer computes with them."""

    def forward(self, *args: Any) -> Any:
        raise RuntimeError("these are tensors of the layer that holds them")


def _remove(model: nn.Module, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    module._parameters.pop(leaf, None)
    module._buffers.pop(leaf, None)
    while isinstance(module, Inserted) and not (module._parameters or module._buffers or module._modules):
        path, _, leaf = path.rpartition(".")
        module = model.get_submodule(path)
        module._modules.pop(leaf, None)


def state_of(model: nn.Module) -> LiveState | None:
    state = vars(model).get(ATTRIBUTE)
    return state if isinstance(state, LiveState) else None
