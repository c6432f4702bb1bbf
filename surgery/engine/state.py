"""A program as data: base, journal and tensors, with its graph, parameters and module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self, TypedDict

import torch
from torch import Tensor, fx, nn

from surgery.capture.devices import exact, find_device
from surgery.capture.shapes import outside
from surgery.common.errors import JournalError, PassError, SurgeryError
from surgery.common.readers import first_line
from surgery.engine import replay
from surgery.engine.base import Base
from surgery.engine.data import ProgramData, check_present
from surgery.engine.fold import fold, lengthening
from surgery.engine.journal import Entry, Journal
from surgery.engine.module import ProgramModule
from surgery.engine.moving import converted, moved
from surgery.engine.schedule import Window
from surgery.graph.graphs import live_nodes


class State(ProgramData):
    """A program with its values: what its parameters are now, and how it runs. `Program` adds the verbs.

    See ProgramData for the attributes.
    """

    def __repr__(self) -> str:
        total, trainable = self.count_parameters()
        applied = ", ".join(e.id for e in self.journal) or "nothing applied"
        name = type(self.base.loaded.module).__name__
        return f"<Program of {name}: {total:,} parameters, {trainable:,} trainable; {applied}>"

    # -- reading

    def parameter_groups(
        self, lr: float = 1e-3, *, weight_decay: float = 0.0, step: int | None = None
    ) -> list[ParameterGroup]:
        """Parameter groups for a torch optimizer, one for each learning rate, weight decay and training window.

        Use them in one optimizer and call `module.advance(step)` before each step; see
        surgery.engine.state.parameter_groups.

        Args:
            lr: Learning rate of a parameter with rate 1.
            weight_decay: Weight decay of weight matrices. Norms, biases and masked parameters get none.
            step: Only the parameters that train at this step; None: all that train at any step.

        Raises:
            PassError: No parameter trains.
        """
        return parameter_groups(self, lr, weight_decay=weight_decay, step=step)

    def parameter_sizes(self) -> dict[str, int]:
        """Number of values of each parameter, by name.

        A tied parameter is listed once. Folded adapters and base weights that a pass has replaced are not listed.
        """
        tensors = {**self.base.tensors, **self.tensors}
        merged = folded_entries(self.journal)
        if merged and lengthening(self.base, merged, self.tensors, self.sites):
            tensors.update(self.folded())
        left = unread(self)
        return {n: tensors[n].numel() for n in self.parameter_names() if n not in left}

    def count_parameters(self) -> tuple[int, int]:
        """Total and trainable number of parameters, as counted by `parameter_sizes`.

        Of a parameter under a gradient mask, only the values that train count as trainable.
        """
        sizes, masks = self.parameter_sizes(), self.schedule.masks
        held = {n: self.tensors[masks[n]] for n in sizes if n in masks}
        trained = (trained_values(size, held.get(n)) for n, size in sizes.items() if self.trains(n))
        return sum(sizes.values()), sum(trained)

    # -- device and dtype

    def to(
        self,
        *targets: torch.device | str | torch.dtype,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The program on another device, in another floating-point dtype, or both. Its graph and journal stay.

        A program is on one device. In another dtype the base is captured again, because a graph can contain casts, and
        the journal is replayed: no pass draws or measures again. Adapters are converted with the weights; codes of
        quantized weights are kept.

        Args:
            targets: A device ("cuda"), a dtype (torch.bfloat16), or both.
            device: The device, by keyword.
            dtype: The dtype, by keyword.

        Returns:
            A program with tensors of its own, or this program if it needs no change.

        Raises:
            LoadError: This machine has no such device.
            PassError: The weights are not in memory, or the target is no floating-point dtype.
            CaptureError: The model cannot be captured in that dtype.
            JournalError: The passes do not fit the model in that dtype.
        """
        for target in targets:
            if isinstance(target, torch.dtype):
                dtype = target
            else:
                device = target
        made = self if device is None else self._on(exact(find_device(device)))
        return made if dtype is None else made._in(dtype)

    def _on(self, device: torch.device) -> Self:
        held = (*self.base.tensors.values(), *self.tensors.values(), *self.changed.values())
        if all(tensor.device == device for tensor in held):
            return self
        base = self.base if self.base.device == device else moved(self.base, device)
        return self._over(base, lambda tensor: tensor.to(device), self.graph)

    def _in(self, dtype: torch.dtype) -> Self:
        if not dtype.is_floating_point:
            raise PassError(f"a program cannot be in {dtype}; give a floating-point dtype")
        old = {site.float_dtype for site in self.base.sites} or {self.precision}
        if old == {dtype} and self.precision == dtype:
            return self
        base = converted(self.base, dtype)
        made = self._over(
            base,
            lambda tensor: tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype in old else tensor,
        )
        # An entry that does not fit is reported here, not at the first run.
        made._graph = replay.build_graph(base, made.journal, made.tensors, base.captured, stored=True)
        return made

    def _over(self, base: Base, change: Callable[[Tensor], Tensor], graph: fx.Graph | None = None) -> Self:
        """A program on another base with changed copies of the tensors, which trains independently of this one."""

        def own(tensor: Tensor) -> Tensor:
            made = change(tensor.detach())
            made = made if made is not tensor and made.data_ptr() != tensor.data_ptr() else made.clone()
            return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

        made = type(self)(
            base,
            self.journal,
            {name: own(tensor) for name, tensor in self.tensors.items()},
            {name: own(tensor) for name, tensor in self.changed.items()},
            graph,
            self.reports,
            copy.copy(self.clock),
        )
        made.labels = dict(self.labels)
        return made

    def follow(self, module: nn.Module) -> None:
        """Take over the tensors of the program's module after `module.to(…)` has moved or converted them.

        The base follows as well, as a new one that shares the memory of the module's frozen weights.
        """
        there: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        there.update(module.named_buffers(remove_duplicate=False))
        device = next((tensor.device for tensor in there.values()), self.device)
        for own in (self.tensors, self.changed):
            for name, tensor in own.items():
                now = there.get(name)
                own[name] = tensor if now is None else now
                if now is None and tensor.device != device:
                    value = tensor.detach().to(device)
                    own[name] = (
                        nn.Parameter(value, tensor.requires_grad)
                        if isinstance(tensor, nn.Parameter)
                        else value
                    )
        if device != self.base.device:
            mine = {name for name in there if name in self.changed or name in self.folded()}
            self.base = moved(self.base, device, {n: t for n, t in there.items() if n not in mine})
            self._runner = None
            self.__dict__.pop("captured", None)

    # -- running

    def module(self) -> ProgramModule:
        """A trainable nn.Module, in eval mode. Call `.train()` on it to run the graph of train mode.

        Every call returns the same module. Base parameters that train are copied first: training changes neither the
        original model nor other programs on this base. Programs from `without`, `weighted`, `only` and `merge` share
        the trained tensors.

        Raises:
            JournalError: A weight that the graph reads was released from memory.
        """
        if self._module is None:
            self.own()
            self._module = self._make_module()
            self._module.advance(self.clock.step)
        return self._module

    def _make_module(self) -> ProgramModule:
        """A module with the tensors of the program, without those that a pass has replaced; see `unread`."""
        title = type(self.base.loaded.module).__name__
        if self.base.released:
            check_present(self, "the program", read_names(self.graph))
        paced = replay.paced(self.base, self.journal)
        followed = {name for each in paced for r in each.sites for name in (r.key.owner, *r.tensors.values())}
        left = unread(self) - followed
        state = {name: tensor for name, tensor in self.state().items() if name not in left}
        schedule = self.schedule
        own = {id(tensor) for tensor in held_by(self).values()}
        trains = [n for n, tensor in state.items() if id(tensor) in own and self.trains(n)]
        masks = {name: self.tensors[mask] for name, mask in schedule.masks.items()}
        return ProgramModule(
            state,
            self.base.non_persistent,
            self._graph_of,
            title,
            trains,
            masks,
            schedule,
            self.clock,
            paced,
            self,
        )

    def state(self) -> dict[str, Tensor]:
        """Current value of every parameter and buffer by name. A tied tensor is one object under several names."""
        return state_of(self)

    def folded(self) -> dict[str, Tensor]:
        """Merged base weights by name, computed from the base and the adapters at every call."""
        return folded_of(self)

    def own(self) -> None:
        """Copy every base tensor that training can change into `changed`: trainable parameters and all buffers."""
        if self.base.in_memory:
            for name in self.parameter_sizes():
                if name in self.base.tensors and name not in self.changed and self.trains(name):
                    self.changed[name] = nn.Parameter(self.base.tensors[name].detach().clone())
            # A buffer with several names stays one tensor.
            copied = {id(t): self.changed[n] for n, t in self.base.tensors.items() if n in self.changed}
            for name, tensor in self.base.tensors.items():
                if not isinstance(tensor, nn.Parameter) and name not in self.changed:
                    self.changed[name] = copied.setdefault(id(tensor), tensor.clone())

    def copies(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies of `tensors` and `changed`, for a derived program that trains independently of this one."""

        def copied(tensor: Tensor) -> Tensor:
            fresh = tensor.detach().clone()
            return nn.Parameter(fresh) if isinstance(tensor, nn.Parameter) else fresh

        return (
            {name: copied(tensor) for name, tensor in self.tensors.items()},
            {name: copied(tensor) for name, tensor in self.changed.items()},
        )

    def _graph_of(self, training: bool) -> tuple[fx.Graph, fx.GraphModule]:
        if not training:
            return self.graph, self.base.captured.graph_module
        return self.train_graph, self.base.train_capture().graph_module

    @property
    def train_graph(self) -> fx.Graph:
        """The graph of train mode.

        Raises:
            CaptureError: The model cannot be captured in train mode.
        """
        captured = self.base.train_capture()
        if self._train_graph is None:
            self._train_graph = replay.build_graph(self.base, self.journal, self.tensors, captured)
        return self._train_graph

    @property
    def graph_module(self) -> fx.GraphModule:
        """The compiled eval graph with this program's tensors, for inference; for training use `module()`."""
        if self._module is not None:
            return self._module.graph_module(training=False)
        if self._runner is None or self._runner[0] != len(self.changed):
            self._runner = (len(self.changed), self._make_module().graph_module(training=False))
        return self._runner[1]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the eval graph without gradients.

        Args:
            args: Positional inputs of the model; without any inputs, the example inputs are used.
            kwargs: Keyword inputs of the model.

        Returns:
            The outputs, in the structure that the model returns.

        Raises:
            JournalError: The program fails on the example inputs.
            PassError: The program fails on inputs whose size is outside the range of a dimension.
        """
        if args or kwargs:
            try:
                with torch.no_grad():
                    return self.graph_module(*args, **kwargs)
            except Exception as error:
                if found := outside(self.captured, args, kwargs):
                    raise PassError(
                        f"{found}; give inputs of such a size, or capture the model again"
                    ) from error
                raise
        args, kwargs = self.example_inputs
        try:
            with torch.no_grad():
                return self.graph_module(*args, **kwargs)
        except SurgeryError:
            raise
        except Exception as error:
            # The inputs are right, so a pass is wrong, or what a saved directory holds for it.
            raise JournalError(
                f"the program fails on its example inputs ({type(error).__name__}: {first_line(error)}); undo the "
                "last pass, or restore the saved directory"
            ) from error


def read_names(graph: fx.Graph) -> set[str]:
    """Names of the tensors that an output of the graph depends on."""
    return {str(node.target) for node in live_nodes(graph) if node.op == "get_attr"}


def unread(program: State) -> set[str]:
    """Names of the tensors that passes have left without a reader.

    These are the base's tensors that its own graph reads and the program's does not, since a pass has replaced them,
    and tensors of passes that a later pass has replaced. A tied tensor has a reader under any of its names.
    """
    base, now = read_names(program.base.captured.graph), read_names(program.graph)
    found = set()
    for name in (*program.base.tensors, *program.tensors):
        names = program.base.names.get(name, (name,))
        gone = name not in program.base.tensors or not base.isdisjoint(names)
        if gone and now.isdisjoint(names):
            found.add(name)
    return found


def state_of(program: State) -> dict[str, Tensor]:
    """Current value of every parameter and buffer; see State.state."""
    # id of a base tensor -> the parameter over its memory: tied names get the same object.
    shells: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    folded, held = program.folded(), held_by(program)
    for name, tensor in held.items():
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(program.trains(name, program.clock.step))
    for name, tensor in program.base.tensors.items():
        if name in folded:
            shared = folded[name]
            state[name] = shells.setdefault(id(shared), nn.Parameter(shared, requires_grad=False))
            continue
        if id(tensor) not in shells:
            shells[id(tensor)] = _shell(program, name, tensor, held)
        state[name] = shells[id(tensor)]
    live = {n for e in replay.live_entries(program.journal) for n in e.tensor_names}
    for name in program.tensors:
        if name in folded:
            state[name] = nn.Parameter(folded[name], requires_grad=False)
        elif name in live:
            state[name] = held[name]
    return state


def folded_of(program: State) -> dict[str, Tensor]:
    """Merged base weights; see State.folded."""
    entries = folded_entries(program.journal)
    if not entries:
        return {}
    base = program.base
    held = {n: t for name, t in held_by(program).items() for n in base.names.get(name, (name,))}
    return fold(base, entries, program.tensors, {**base.tensors, **held}, program.sites)


def folded_entries(journal: Journal) -> list[Entry]:
    """The entries that merges folded into weights."""
    ids = {name for e in journal if e.kind == "merge" for name in e.options.get("folded", ())}
    return [e for e in journal if e.id in ids]


def held_by(program: State) -> dict[str, Tensor]:
    """Changed and inserted tensors that are in force.

    Parameters that only entries of weight 0 let train have their earlier values. Buffers that moved in training (the
    running statistics of a BatchNorm, say) belong to the passes: with all of them off, the base's own are in force.
    """
    held = {**program.changed, **program.tensors}
    if program.dormant:
        held = {name: t for name, t in held.items() if name in program.tensors or isinstance(t, nn.Parameter)}
    for name, before in program.put_back.items():
        if before is None:
            held.pop(name, None)
        else:
            held[name] = nn.Parameter(program.tensors[before], requires_grad=False)
    return held


def _shell(program: State, name: str, tensor: Tensor, held: Mapping[str, Tensor]) -> Tensor:
    """The program's own tensor, or else a new parameter over the memory of the base's."""
    canonical = program.base.names.get(name, (name,))[0]
    if canonical in held:
        return held[canonical]
    if isinstance(tensor, nn.Parameter):
        shell = nn.Parameter(tensor.detach(), requires_grad=False)
        program.base.shells[canonical, id(shell)] = shell
        return shell
    # A forward in train mode must not move the base's own.
    return tensor.clone() if program.dormant else tensor


def trained_values(size: int, mask: Tensor | None) -> int:
    """Number of values of a parameter that train under a mask, which may have size 1 along an axis."""
    return size if mask is None else int(mask.sum()) * (size // mask.numel())


class ParameterGroup(TypedDict, total=False):
    """A parameter group of a torch optimizer. Optimizers ignore `names` and `window`, which are for display."""

    params: list[nn.Parameter]
    lr: float
    weight_decay: float
    names: list[str]
    window: Window


def parameter_groups(
    program: State, lr: float, *, weight_decay: float = 0.0, step: int | None = None
) -> list[ParameterGroup]:
    """Trainable parameters of `program.module()`, grouped by learning rate, weight decay and training window.

    Pass the groups to one optimizer and call `module.advance(step)` before each step. It sets the gradient of a
    parameter outside its window to None; optimizers skip such a parameter, including its momentum. A learning-rate
    scheduler scales each group from its own rate.

    A gradient mask sets gradients to zero. SGD, Adam, AdamW and similar optimizers then leave the masked values
    unchanged bit for bit, but weight decay would still move them. Therefore masked parameters get no decay here; if you
    use `module.parameters()` instead of these groups, set the optimizer's weight decay to 0.

    Args:
        program: The program.
        lr: Learning rate of a parameter with rate 1.
        weight_decay: Weight decay of weight matrices. Norms, biases and masked parameters get none.
        step: Only the parameters that train at this step; None: all that train at any step.

    Raises:
        PassError: No parameter trains.
    """
    module = program.module()
    schedule = program.schedule
    groups: dict[tuple[float, float, Window], ParameterGroup] = {}
    tensors: dict[str, Any] = dict(module.named_parameters())
    read = program.parameter_sizes().keys()
    for name, parameter in tensors.items():
        names = program.names.get(name, (name,))
        if not program.trains(name, step) or read.isdisjoint(names):
            continue
        decays = parameter.dim() > 1 and schedule.masks.keys().isdisjoint(names)
        key = (schedule.rate(names), weight_decay if decays else 0.0, schedule.window(names))
        group = groups.setdefault(
            key, {"params": [], "lr": lr * key[0], "weight_decay": key[1], "names": [], "window": key[2]}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        when = "" if step is None else f" at {schedule.unit} {step}"
        raise PassError(
            f"nothing trains in this program{when}; select something (full, layerwise, …) or add an adapter"
        )
    return list(groups.values())
