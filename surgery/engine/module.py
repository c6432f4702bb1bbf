"""`program.module()`: a trainable nn.Module that runs a program's graphs, with separate train and eval graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from surgery.capture.devices import HOME, device_of, placed, placed_module
from surgery.common.errors import JournalError, PassError
from surgery.common.readers import first_line
from surgery.engine.recompute import REMADE, recomputed
from surgery.engine.replay import GradualEntry
from surgery.engine.schedule import Clock, Schedule
from surgery.graph.compiled import compiled
from surgery.graph.graphs import copy_graph, live_nodes, without_replaced

# Parameter -> handle of the hook that masks its gradient. Not an attribute, since hooks cannot be pickled.
_masks: Any = WeakTensorKeyDictionary()
GraphOf = Callable[[bool], tuple[fx.Graph, fx.GraphModule]]


class ProgramModule(nn.Module):
    """Module with a program's parameters and buffers under their original names.

    In eval mode, forward runs the eval graph; after `train()` it runs the graph that was captured in train mode. Both
    graphs read the same tensors. The train graph is captured at the first call of `train()`, which raises CaptureError
    if the model cannot be captured in train mode.

    Args:
        tensors: Parameters and buffers, by name.
        non_persistent: Names of the buffers that a state dict leaves out.
        graph_of: Function training -> (graph, graph module that it was captured as).
        name: Class name of the compiled graph modules.
        trains: Names of the parameters that train at some step.
        masks: Parameter name -> bool tensor of the values that train; the gradient of the others is zero.
        schedule: Training window of each parameter; `advance(step)` moves through it.
        clock: Current training step, shared with the modules over the same parameters.
        paced: Journal entries whose tensors change as training proceeds.
        program: The program of the module.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        non_persistent: frozenset[str],
        graph_of: GraphOf,
        name: str,
        trains: Collection[str] = (),
        masks: Mapping[str, Tensor] | None = None,
        schedule: Schedule | None = None,
        clock: Clock | None = None,
        paced: Sequence[GradualEntry] = (),
        program: Any = None,
    ) -> None:
        super().__init__()
        self.training = False
        # Written to __dict__, since nn.Module registers modules, parameters and buffers that are assigned.
        self.__dict__["_trains"] = frozenset(trains)
        self.__dict__["_masks"] = dict(masks or {})
        self.__dict__["_schedule"] = schedule or Schedule()
        self.__dict__["_clock"] = clock or Clock()
        self.__dict__["_paced"] = list(paced)
        self.__dict__["_program"] = program
        for path, tensor in tensors.items():
            register(self, path, tensor, path not in non_persistent)
        self.__dict__["_graph_of"] = graph_of
        self.__dict__["_compiled"] = {}
        self.__dict__["_bodies"] = {}
        self.__dict__["_placed"] = HOME
        self.__dict__["_title"] = name
        self._hold()

    def _hold(self) -> None:
        """Mask the gradients of the parameters that train in part."""
        masks: dict[str, Tensor] = self.__dict__["_masks"]
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if name in masks and name in self.__dict__["_trains"]:
                mask_gradient(parameter, masks[name])

    def advance(self, step: int) -> list[str]:
        """Set `requires_grad` of every parameter for a training step, and update tensors that follow a schedule.

        The gradient of a parameter outside its window is set to None, so that no optimizer moves it.

        Args:
            step: Number of the step; of the epoch, if the schedule counts epochs.

        Returns:
            Names of the parameters that train at this step.
        """
        schedule: Schedule = self.__dict__["_schedule"]
        names: dict[int, tuple[str, ...]] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            names[id(parameter)] = (*names.get(id(parameter), ()), name)
        self.__dict__["_clock"].step = step
        training = []
        for name, parameter in self.named_parameters():
            own = names[id(parameter)]
            trains = not self.__dict__["_trains"].isdisjoint(own) and schedule.trains(own, step)
            if parameter.requires_grad != trains:
                parameter.requires_grad_(trains)
            if not trains:
                parameter.grad = None
            if trains:
                training.append(name)
        for paced in self.__dict__["_paced"]:
            paced.advance(self, step)
        return training

    @property
    def device(self) -> torch.device:
        """Device of the parameters, or of the buffers if there are none; the CPU without tensors."""
        return device_of(self)

    def graph_module(self, training: bool | None = None) -> fx.GraphModule:
        """The compiled graph of a mode; it shares this module's tensors.

        Args:
            training: True for the train graph, False for the eval graph, None for the module's current mode.
        """
        training = self.training if training is None else training
        compiled: dict[bool, fx.GraphModule] = self.__dict__["_compiled"]
        device = self.device
        if device != self.__dict__["_placed"]:
            # `to`, accelerate or FSDP has moved the tensors; graphs are compiled for one device.
            compiled.clear()
            self.__dict__["_placed"] = device
            for name, body in self.__dict__["_bodies"].items():
                attach(self, name, placed_module(body, device))
        if training not in compiled:
            graph, source = self.__dict__["_graph_of"](training)
            graph = placed(without_replaced(graph), device)
            for node in graph.nodes:
                if node.op == "get_attr" and not _has(self, node.target):
                    self._add(str(node.target), source)
            module = self._over(graph, source)
            if any(node.target in REMADE for node in graph.nodes):
                module.__dict__["forward"] = recomputed(module.forward)
            compiled[training] = module
        return compiled[training]

    def _add(self, name: str, source: fx.GraphModule) -> None:
        """Add what a graph reads and the module lacks.

        These are tensors that the graph of the other mode does not read, and submodules of higher-order ops (the body
        of a loop, say), which belong to the captured graph module.
        """
        program = self.__dict__["_program"]
        held = program.state().get(name) if program is not None else None
        if isinstance(held, Tensor):
            register(self, name, held, name not in program.base.non_persistent)
        else:
            found = get(source, name)
            if isinstance(found, fx.GraphModule):
                self.__dict__["_bodies"][name] = found
                found = placed_module(found, self.device)
            attach(self, name, found)

    def variant(self, training: bool, change: Callable[[fx.Graph], None]) -> fx.GraphModule:
        """A changed copy of a mode's graph, over the same tensors.

        Unlike `graph_module`, it keeps dequantized weights until the backward pass: `change` may read values that would
        otherwise be recomputed.

        Args:
            training: True for the train graph, False for the eval graph.
            change: Function that edits the copy.
        """
        plain = self.graph_module(training)
        graph = copy_graph(plain.graph)
        change(graph)
        return self._over(graph, plain)

    def _over(self, graph: fx.Graph, source: fx.GraphModule) -> fx.GraphModule:
        return over(self, graph, self.__dict__["_title"], source)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the current mode; arguments and outputs are those of the original model."""
        return self.graph_module()(*args, **kwargs)

    def train(self, mode: bool = True) -> ProgramModule:
        """Switch to train or eval mode; see nn.Module.train.

        Raises:
            CaptureError: The model cannot be captured in train mode.
        """
        # Compiled first: a capture that fails leaves the mode unchanged.
        self.graph_module(mode)
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ProgramModule:
        """Convert the tensors, as `to` does. The program of the module follows: it is on that device from then on.

        Raises:
            PassError: The function converts to another dtype, and the graph names the dtype that it was captured in.
        """
        for dtype in {t.dtype for t in (*self.parameters(), *self.buffers()) if t.is_floating_point()}:
            made = fn(torch.empty(0, dtype=dtype)).dtype
            node = _names_dtype(self.graph_module().graph) if made != dtype else None
            if node is not None:
                raise PassError(
                    f"the module of a program cannot be converted to {str(made).removeprefix('torch.')}, because its "
                    f"graph names {str(dtype).removeprefix('torch.')} ({node.target}); use "
                    f"program.to({made}).module(), which captures the model again in that dtype"
                )
        super()._apply(fn, recurse)
        program = self.__dict__["_program"]
        if program is not None and program._module is self:
            program.follow(self)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ProgramModule:
        fresh = ProgramModule({}, frozenset(), self.__dict__["_graph_of"], self.__dict__["_title"])
        memo[id(self)] = fresh
        shared = ("_masks", "_schedule", "_trains", "_program", "_bodies")
        for key, value in self.__dict__.items():
            if key not in (*shared, "_graph_of", "_compiled", "_title", "_bodies"):
                fresh.__dict__[key] = copy.deepcopy(value, memo)
        for key in shared:
            fresh.__dict__[key] = self.__dict__[key]
        fresh._hold()
        return fresh

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "the module of a program cannot be pickled; save the program, or this module's state_dict()"
        )


def _names_dtype(graph: fx.Graph) -> fx.Node | None:
    """A node whose floating-point dtype does not follow from its inputs; None if there is none."""
    for node in live_nodes(graph):
        if node.op != "call_function":
            continue
        leaves = tree_leaves((node.args, node.kwargs))
        value = node.meta.get("val")
        made = isinstance(value, Tensor) and value.is_floating_point() and not node.all_input_nodes
        if made or any(isinstance(leaf, torch.dtype) and leaf.is_floating_point for leaf in leaves):
            return node
    return None


def mask_gradient(parameter: nn.Parameter, mask: Tensor) -> None:
    """Zero the gradient of a parameter where its mask is False. A later mask replaces an earlier one."""
    known = _masks.get(parameter)
    if known is not None:
        known.remove()
    held = ~mask

    def hold(grad: Tensor) -> Tensor:
        nonlocal held
        held = held.to(grad.device)
        return grad.masked_fill(held, 0)

    trains = parameter.requires_grad
    # torch accepts a hook only on a tensor that requires grad; the hook stays when that is switched off again.
    parameter.requires_grad_(True)
    _masks[parameter] = parameter.register_hook(hold)
    parameter.requires_grad_(trains)


def over(
    module: nn.Module, graph: fx.Graph, name: str, source: fx.GraphModule | None = None
) -> fx.GraphModule:
    """A graph module that reads a module's tensors, also those that are assigned to the module later.

    Args:
        module: Module with the tensors.
        graph: The graph to run.
        name: Class name of the graph module.
        source: Graph module with the same inputs and outputs; its pytree specs are copied.
    """
    made = compiled(module, graph, name)
    # The dictionaries are shared: a tensor that is replaced in the module is replaced here as well.
    made.__dict__.update(_parameters=module._parameters, _buffers=module._buffers, _modules=module._modules)
    for spec in ("_in_spec", "_out_spec"):
        # A graph with an added output has its own spec already.
        if hasattr(source, spec) and not hasattr(made, spec):
            made.__dict__[spec] = getattr(source, spec)
    return made


def get(root: Any, path: str) -> Any:
    """The attribute at a dotted path."""
    for part in path.split("."):
        root = getattr(root, part)
    return root


def memory_of(value: Any) -> Any:
    """Key that is equal for tensors over the same memory with the same dtype, shape and strides; else the id."""
    if not isinstance(value, Tensor):
        return id(value)
    return value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), str(value.device)


def _has(root: Any, path: str) -> bool:
    """True if there is an attribute at a dotted path."""
    for part in path.split("."):
        if not hasattr(root, part):
            return False
        root = getattr(root, part)
    return True


def _container(root: nn.Module, path: str, kind: type[nn.Module] = nn.Module) -> tuple[nn.Module, str]:
    """The module that contains a dotted path, and the last component; missing modules are created."""
    *parents, leaf = path.split(".")
    for part in parents:
        child = root._modules.get(part)
        if child is None:
            child = kind()
            child.training = root.training
            root.add_module(part, child)
        root = child
    return root, leaf


def register(
    root: nn.Module, path: str, tensor: Tensor, persistent: bool = True, kind: type[nn.Module] = nn.Module
) -> None:
    """Register a parameter or buffer under a dotted path.

    Args:
        root: Module that the path starts at.
        path: Dotted path of the tensor.
        tensor: Parameter, or tensor to register as a buffer.
        persistent: False for a buffer that a state dict leaves out.
        kind: Class of the modules that are created where the path has none.

    Raises:
        JournalError: The name, or a component of it, is taken by an attribute of the module.
    """
    try:
        owner, leaf = _container(root, path, kind)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor, persistent=persistent)
    except (KeyError, AttributeError) as error:
        raise JournalError(
            f"the name {path} is taken in {type(root).__name__}: {first_line(error)}"
        ) from None


def attach(root: nn.Module, path: str, value: Any) -> None:
    """Set the attribute at a dotted path.

    Args:
        root: Module that the path starts at.
        path: Dotted path; missing modules on the way are created.
        value: Value of the attribute.
    """
    owner, leaf = _container(root, path)
    setattr(owner, leaf, value)
