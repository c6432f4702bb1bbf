"""State of a live module: its program, and the code that installs the program in its layers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from surgery.capture import LoadedModel
from surgery.capture.hf_config import configs
from surgery.common.errors import PassError
from surgery.engine.base import Base
from surgery.engine.contract.base import Pass, RewritePass
from surgery.engine.module import get, mask_gradient, register
from surgery.engine.program import Program
from surgery.engine.replay import live_entries, pass_of
from surgery.engine.schedule import Schedule
from surgery.engine.state import held_by
from surgery.graph.ops import EXPERTS
from surgery.graph.sites import Site, SiteKey
from surgery.live.capture import Seen
from surgery.live.layer import LayerError, Layers, Piece, input_name
from surgery.live.places import Inserted, is_shard, local_name, remove
from surgery.live.unseen import keep_off_fast_path, raw_reads
from surgery.live.views import Switch, View

ATTRIBUTE = "_surgery_state"


class LiveState:
    """The program of a live model, over the model's own tensors.

    The base has the original parameters and buffers. Parameters that train, and all buffers, are replaced in the model
    by copies, which are in `program.changed`, so that undoing restores the model bit for bit.

    Attributes:
        adopted: The program of the model outside of blocks such as `using`.
        switch: The open blocks.
        seen: Inputs of each layer on the example inputs, by path.
        layers: Cache of rewritten layers.
        uncaptured: Reason why the model could not be captured, or "".
        required: Name of a base parameter -> its original `requires_grad`.
    """

    def __init__(
        self,
        program: Program,
        seen: Mapping[str, Seen],
        layers: Layers,
        uncaptured: str = "",
        example: LoadedModel | None = None,
    ) -> None:
        self.adopted = program
        self.switch = Switch()
        self.seen = dict(seen)
        self.layers = layers
        self.uncaptured = uncaptured
        self.example = program.base.loaded if example is None and not uncaptured else example
        reads = raw_reads(example) if uncaptured and example is not None else {}
        self.raw = reads or {}
        if reads is None:
            self.example = None
        self._tied: list[tuple[Any, bool]] = []
        self.required = {
            n: t.requires_grad for n, t in program.base.tensors.items() if isinstance(t, nn.Parameter)
        }
        # Name of an inserted tensor in the model -> its name in the program.
        self.at: dict[str, str] = {}
        # Name of a base tensor -> the tensor that the model has for it.
        self.put: dict[str, Tensor] = {}
        # Their shapes.
        self.shapes: dict[str, torch.Size] = {}
        program.base.hindrance = self.hindrance

    @property
    def program(self) -> Program:
        """The program of the running context: inside a block that of the block, else the adopted one."""
        view = self.switch.view
        return self.adopted if view is None else view.program

    @contextlib.contextmanager
    def showing(
        self,
        model: nn.Module,
        block: str,
        program: Program,
        classes: Mapping[str, type[nn.Module]] | None = None,
    ) -> Iterator[None]:
        """Context manager in which the running thread or task computes with another program over the same tensors.

        Args:
            model: The live module.
            block: Name of the function that opens the block, for messages.
            program: The program inside the block.
            classes: Classes of the layers inside the block, by path; by default those of the program.

        Raises:
            PassError: The program needs other values in the model, and another thread is inside a block.
        """
        self._refuse_shards(model)
        outer = self.switch.view
        alone = any(v.alone for v in (outer.chain if outer else ())) or self._moves_values(program)
        found = self.classes(model, program) if classes is None else dict(classes)
        for path in self.classes(model, self.adopted):
            found.setdefault(path, getattr(base := type(model.get_submodule(path)), "surgery_base", base))
        view = View(block, program, {} if alone and classes is None else found, alone, outer)
        before = next((v.program for v in (outer.chain if outer else ()) if v.alone), self.adopted)
        with self.switch.showing(model, view):
            if not alone or classes is not None:
                yield
                return
            try:
                self._install(model, program)
                yield
            finally:
                self._install(model, before)

    def _moves_values(self, program: Program) -> bool:
        """True if the model needs other values of parameters or buffers for a program than it has."""
        if program.journal.merged or program.put_back != self.program.put_back:
            return True
        base = program.base
        return program.dormant != self.program.dormant and any(
            not torch.equal(tensor, base.tensors[name].to(tensor.device))
            for name, tensor in program.changed.items()
            if not isinstance(tensor, nn.Parameter) and name in base.tensors
        )

    def __getstate__(self) -> dict[str, Any]:
        """The state for a pickle. Inside a block, the program is that of the block."""
        return {**self.__dict__, "adopted": self.program, "switch": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.switch = Switch()
        self.adopted.base.hindrance = self.hindrance
        held = {**self.adopted.changed, **self.adopted.tensors}
        for name, mask in Schedule.of(self.adopted.journal).masks.items():
            if name in held:
                mask_gradient(held[name], self.adopted.tensors[mask])  # type: ignore[arg-type]

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveState:
        """State for a copy of the model: tensors are copied with the model; graph and classes are shared."""
        program = self.program
        old = program.base
        module, whole = copy.deepcopy((old.loaded.module, old.loaded.whole), memo)
        base = Base(
            replace(old.loaded, module=module, whole=whole),
            old.captured,
            old.plugins,
            old.ref,
            old.options,
            heads=old.heads,
        )
        fresh = LiveState.__new__(LiveState)
        fresh.__dict__.update(self.__dict__)
        fresh.adopted, fresh.switch = copy.deepcopy(program, memo), Switch()
        fresh.adopted.base = base
        base.hindrance = fresh.hindrance
        fresh.example = replace(self.example, module=module) if self.example is not None else None
        fresh.required, fresh.at = dict(self.required), dict(self.at)
        fresh.put = {name: copy.deepcopy(tensor, memo) for name, tensor in self.put.items()}
        # The copy's configuration reports untied weights, too, until the merge is undone.
        fresh._tied = [(copy.deepcopy(config, memo), was) for config, was in self._tied]
        # Hooks that mask gradients are not copied with a parameter.
        if fresh.adopted.schedule.masks:
            fresh.adopted.module()
        return fresh

    # -- which passes and sites

    def refuse(self, passes: Iterable[Pass]) -> None:
        """Raise PassError for a pass that changes more than single layers."""
        for pass_ in passes:
            if isinstance(pass_, RewritePass) and not pass_.effect.one_layer:
                raise PassError(
                    f"{pass_.name} changes more than single layers, which a live model does not support; apply it to "
                    f"the model's program: surgery.load('hf:…') or surgery.capture(model, inputs)"
                )

    def _layer(self, path: str) -> nn.Module:
        """The layer of the base at a path; LayerError if a pass created it."""
        try:
            return self.program.base.loaded.module.get_submodule(path)
        except AttributeError:
            raise LayerError("a pass created it, and the live model has no such layer") from None

    def hindrance(self, site: Site) -> str | None:
        """Reason why a site cannot be rewritten in the live model, or None."""
        if site.kind == EXPERTS:
            return "its experts are one stacked tensor that is not the weight of a layer; capture the model for these"
        # A computed weight is refused by the pass itself, with a more specific reason.
        if site.weight is None:
            return None
        if self.uncaptured:
            why = next((self.raw[path] for path in self._owners(site.weight) if path in self.raw), None)
            return f"{why}, so an adapter of the layer would not act; leave it out" if why else None
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
        return f"it cannot be rewritten in place ({problem}); capture the model and apply the pass to its program"

    def _users(self, key: SiteKey, named: set[tuple[str, str]]) -> list[str]:
        """Paths of the modules whose calls a site can consist of.

        These are the module that the site is named after, and, for a tied weight, other modules that own the weight
        and that no other site is named after.

        Args:
            key: Key of the site.
            named: (kind, module path) of every site.
        """
        own = key.owner.rpartition(".")[0]
        return [path for path in self._owners(key.owner) if path == own or (key.kind, path) not in named]

    def _owners(self, name: str) -> list[str]:
        """Paths of the modules that own a parameter; several if it is tied."""
        names = self.program.base.names.get(name, (name,))
        return list(dict.fromkeys(n.rpartition(".")[0] for n in names))

    # -- putting a program into the model

    def adopt(self, model: nn.Module, program: Program) -> None:
        """Install a program on the same base in the model. All new layer classes exist before the model is changed.

        Args:
            model: The live module.
            program: The program to install.

        Raises:
            PassError: The model's parameters are sharded, or a layer cannot be rewritten.
        """
        self._install(model, program)
        self.adopted = program

    def _refuse_shards(self, model: nn.Module) -> None:
        if any(is_shard(p) for p in model.parameters()):
            raise PassError(
                "the model's parameters are sharded over several processes; change the model before it is sharded, or "
                "save it and load the saved directory"
            )

    def _install(self, model: nn.Module, program: Program) -> None:
        """Put the classes, tensors and flags of a program into the model."""
        self._refuse_shards(model)
        pieces = self._pieces(program)
        classes = {path: self._class_of(model, path, own, program) for path, own in pieces.items()}
        self._put_tensors(model, program, pieces)
        wanted = {id(model.get_submodule(path)): cls for path, cls in classes.items()}
        for layer in model.modules():
            cls = wanted.get(id(layer)) or getattr(type(layer), "surgery_base", None)
            if cls is not None:
                layer.__class__ = cls
        self._let_train(program)
        self._tell_config(model)
        keep_off_fast_path(model)

    def _tell_config(self, model: nn.Module) -> None:
        """Let the configuration say whether weights are tied: transformers ties them again when it loads or saves."""
        for config, was in self._tied:
            config.tie_word_embeddings = was
        self._tied = []
        parameters = dict(model.named_parameters(remove_duplicate=False))
        groups = (g for n, g in self.adopted.base.names.items() if n == g[0] and len(g) > 1)
        if not any(parameters[n] is not parameters[g[0]] for g in groups for n in g if n in parameters):
            return
        for config in (
            configs(model.config) if isinstance(model, nn.Module) and hasattr(model, "config") else ()
        ):
            if getattr(config, "tie_word_embeddings", False):
                self._tied.append((config, True))
                config.tie_word_embeddings = False

    def classes(self, model: nn.Module, program: Program) -> dict[str, type[nn.Module]]:
        """The class that each rewritten layer gets, by path. Raises PassError if a layer cannot be rewritten."""
        return {
            path: self._class_of(model, path, own, program) for path, own in self._pieces(program).items()
        }

    def _pieces(self, program: Program) -> dict[str, list[Piece]]:
        """Entries that act at each layer, by path."""
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
                        f"{entry.id} at {record.path}: the model uses its weight without calling a layer that has it, "
                        f"so the layer cannot be rewritten; leave the site out, or use the program itself"
                    )
        return found

    def _uses(self, path: str, layer: nn.Module, owner: str, kind: str) -> bool:
        """True if the layer's own forward uses a weight in this kind of op."""
        seen = self.seen.get(path)
        # The model can read the weight without calling the layer.
        if seen is None and not self.uncaptured:
            return False
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
        """Name of a layer's own tensor -> first name of that tensor in the program."""
        own = (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
        full = {name: f"{path}.{name}" if path else name for name, _ in own}
        return {name: program.base.names.get(known, (known,))[0] for name, known in full.items()}

    def _class_of(
        self, model: nn.Module, path: str, pieces: list[Piece], program: Program
    ) -> type[nn.Module]:
        """The class of one rewritten layer."""
        layer = program.base.loaded.module.get_submodule(path)
        live = model.get_submodule(path)
        seen = self.seen.get(path, Seen())
        names = self._names(path, layer, program)
        for piece in pieces:
            for full in piece.record.tensors.values():
                names[local_name(path, full)] = full
        where = f"{pieces[-1].entry.id} at {pieces[-1].record.path}"
        if "forward" in vars(live):
            raise PassError(
                f"{where}: its forward was replaced on the instance, for example by a hook; remove that first"
            )
        try:
            return self.layers.adapted(layer, pieces, names, program.tensors, seen.shapes, seen.dtype)
        except LayerError as error:
            raise PassError(
                f"{where}: {error}; capture the model and apply the pass to its program"
            ) from None

    def _put_tensors(self, model: nn.Module, program: Program, pieces: Mapping[str, list[Piece]]) -> None:
        """Put inserted tensors into the layers that read them, and the program's values into base parameters."""
        wanted = self._places(pieces)
        # A tensor of an adapter that is switched off stays in its layer, since it can be switched on again.
        for name, full in self.at.items():
            if name not in wanted:
                if program.tensors.get(full) is get(model, name):
                    wanted[name] = full
                else:
                    remove(model, name)
        for name, full in wanted.items():
            register(model, name, program.tensors[full], kind=Inserted)
        self.at, self.put = wanted, {}
        held = held_by(program)
        self._put_parameters(model, program, held)
        self._put_buffers(model, program, held)
        self.shapes = {name: tensor.shape for name, tensor in self.put.items()}

    def _put_buffers(self, model: nn.Module, program: Program, held: Mapping[str, Tensor]) -> None:
        """Put a program's buffers into the model: copies, so that training does not move the base's own."""
        own = dict(model.named_buffers(remove_duplicate=False))
        copied: dict[int, Tensor] = {}
        for name, original in program.base.tensors.items():
            if isinstance(original, nn.Parameter) or name not in own:
                continue
            value = held.get(name, original)
            if value is original and program.journal.entries:
                # All passes are off, and a forward in train mode must not move the base's own.
                value = copied.setdefault(id(original), original.clone())
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = value
            self.put[name] = value

    def _put_parameters(self, model: nn.Module, program: Program, held: Mapping[str, Tensor]) -> None:
        """Put a program's values of base parameters into the model."""
        folded = program.folded()
        merged: dict[int, nn.Parameter] = {}
        for name, group in program.base.names.items():
            if name != group[0]:
                continue
            own = held.get(name, program.base.tensors[name])
            for each in group:
                # A merge can change only one use of a tied weight; that module then gets its own parameter.
                value = own
                if each in folded:
                    there = folded[each]
                    value = merged.setdefault(id(there), nn.Parameter(there, requires_grad=False))
                self.put[each] = value
                owner, _, leaf = each.rpartition(".")
                module = model.get_submodule(owner)
                if module._parameters[leaf] is not value:
                    module._parameters[leaf] = value  # type: ignore[assignment]

    def gather(self, model: nn.Module) -> bool:
        """Copy values from the model into the program where the model has other tensors, such as shards of FSDP.

        In sharded training, every process has to call it.

        Returns:
            True if there were shards.
        """
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
        """Name of an inserted tensor -> path of the tensor in the model; the first, if several layers have it."""
        at: dict[str, str] = {}
        for place, full in self._places(self._pieces(program)).items():
            at.setdefault(full, place)
        return at

    def _places(self, pieces: Mapping[str, list[Piece]]) -> dict[str, str]:
        """Path of an inserted tensor in the model -> its name in the program."""
        places = {}
        for path, own in pieces.items():
            for full in dict.fromkeys(f for piece in own for f in piece.record.tensors.values()):
                local = local_name(path, full)
                places[f"{path}.{local}" if path else local] = full
        return places

    def _let_train(self, program: Program) -> None:
        """Set `requires_grad` as a program decides; with an empty journal, restore the original values."""
        for name, tensor in {**program.base.tensors, **program.tensors, **program.changed}.items():
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                bare = not program.journal.entries
                wants = self.required.get(name, True) if bare else program.trains(name, program.clock.step)
                if tensor.requires_grad != wants:
                    tensor.requires_grad_(wants)
        # Making the module registers the hooks that mask gradients.
        if program.schedule.masks:
            program.module()


def state_of(model: nn.Module) -> LiveState | None:
    """The state of a live module; None if no pass has been applied to it."""
    state = vars(model).get(ATTRIBUTE)
    return state if isinstance(state, LiveState) else None


def sharing(program: Program, before: Program) -> Program:
    """The program with the tensors that are in the live module already, instead of copies of them."""
    program.own()
    tensors = {name: before.tensors.get(name, tensor) for name, tensor in program.tensors.items()}
    changed = {}
    for name, tensor in program.changed.items():
        held = before.changed.get(name)
        if held is None:
            changed[name] = tensor
            continue
        # The values differ if undoing a pass restored earlier ones. They are copied, since an optimizer may refer to
        # the tensor in the module.
        if not torch.equal(held, tensor):
            with torch.no_grad():
                held.copy_(tensor)
        changed[name] = held
    return program.derive(
        program.journal, tensors, changed, graph=program._graph, reports=program.reports, clock=program.clock
    )
