"""`program.module()`: a plain trainable nn.Module over a program's graphs, with true train and eval modes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from surgery.engine.recompute import REMADE, recomputed
from surgery.engine.replay import Paced
from surgery.engine.schedule import Clock, Schedule
from surgery.graph.graphs import copy_graph, without_replaced

GraphOf = Callable[[bool], tuple[fx.Graph, fx.GraphModule]]


class ProgramModule(nn.Module):
    """Parameters and buffers by their original names; forward runs the eval or the train graph.

    `train()` switches to the graph that was captured in train mode (made at the first call), and raises
    CaptureError where the model cannot be captured in it. Both graphs read the same tensors.

    trains: names of the parameters that train, at some step. masks: parameter name -> which of its values do; the
    gradient of the others is zero. schedule: when each trains; `advance(step)` moves on in it. clock: the step it
    has come to, shared with the modules over the same parameters. paced: what inserted tensors do as it moves on.
    program: whose module it is.
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
        paced: Sequence[Paced] = (),
        program: Any = None,
    ) -> None:
        super().__init__()
        self.training = False
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
        self.__dict__["_title"] = name
        self._hold()

    def _hold(self) -> None:
        """Mask the gradients of what trains in part."""
        masks: dict[str, Tensor] = self.__dict__["_masks"]
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if name in masks and name in self.__dict__["_trains"]:
                _mask_gradient(parameter, masks[name])

    def advance(self, step: int) -> list[str]:
        """Let train what the schedule lets train at a step (an epoch, where it counts in these), and let passes that
        follow the training change their tensors for it.

        Returns the names of the parameters that train now. What stops keeps no gradient, so that no optimiser
        moves it further.
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

    def graph_module(self, training: bool | None = None) -> fx.GraphModule:
        """The compiled graph of a mode (the current one by default); it shares this module's tensors."""
        training = self.training if training is None else training
        compiled: dict[bool, fx.GraphModule] = self.__dict__["_compiled"]
        if training not in compiled:
            graph, source = self.__dict__["_graph_of"](training)
            for node in graph.nodes:  # submodules of higher-order ops
                if node.op == "get_attr" and not _has(self, node.target):
                    attach(self, node.target, get(source, node.target))
            module = self._over(without_replaced(graph), source)
            if any(node.target in REMADE for node in graph.nodes):
                module.__dict__["forward"] = recomputed(module.forward)
            compiled[training] = module
        return compiled[training]

    def variant(self, training: bool, change: Callable[[fx.Graph], None]) -> fx.GraphModule:
        """A mode's graph with something changed in a copy of it, over the same tensors.

        Quantized weights are kept until the backward pass there: what is recomputed could not be read.
        """
        plain = self.graph_module(training)
        graph = copy_graph(plain.graph)
        change(graph)
        return self._over(graph, plain)

    def _over(self, graph: fx.Graph, source: fx.GraphModule) -> fx.GraphModule:
        return over(self, graph, self.__dict__["_title"], source)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.graph_module()(*args, **kwargs)

    def train(self, mode: bool = True) -> ProgramModule:
        self.graph_module(mode)
        super().train(mode)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ProgramModule:
        fresh = ProgramModule({}, frozenset(), self.__dict__["_graph_of"], self.__dict__["_title"])
        memo[id(self)] = fresh
        shared = ("_masks", "_schedule", "_trains", "_program")
        for key, value in self.__dict__.items():
            if key not in (*shared, "_graph_of", "_compiled", "_title"):
                fresh.__dict__[key] = copy.deepcopy(value, memo)
        for key in shared:
            fresh.__dict__[key] = self.__dict__[key]
        fresh._hold()
        return fresh

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a program's module is not pickled: save the program, or this module's state_dict()")


def _mask_gradient(parameter: nn.Parameter, mask: Tensor) -> None:
    """Let the gradient of a parameter be zero where its mask is; of several masks the last one counts."""
    known: Any = getattr(parameter, "_surgery_mask", None)
    if known is not None:
        known.remove()
    held = ~mask

    def hold(grad: Tensor) -> Tensor:
        nonlocal held
        held = held.to(grad.device)
        return grad.masked_fill(held, 0)

    trains = parameter.requires_grad
    parameter.requires_grad_(True)  # torch takes hooks only then; they stay
    parameter._surgery_mask = parameter.register_hook(hold)  # type: ignore[attr-defined]
    parameter.requires_grad_(trains)


def over(
    module: nn.Module, graph: fx.Graph, name: str, source: fx.GraphModule | None = None
) -> fx.GraphModule:
    """A graph over a module's tensors, whatever stands in their places later. source: what takes and gives the same."""
    made = fx.GraphModule(module, graph, class_name=name)
    made.__dict__.update(_parameters=module._parameters, _buffers=module._buffers, _modules=module._modules)
    for spec in ("_in_spec", "_out_spec"):
        if hasattr(source, spec) and not hasattr(made, spec):  # the graph's own where it adds an output
            made.__dict__[spec] = getattr(source, spec)
    return made


def get(root: Any, path: str) -> Any:
    """What stands at a dotted path."""
    for part in path.split("."):
        root = getattr(root, part)
    return root


def memory_of(value: Any) -> Any:
    """Equal where two tensors are the same memory, read alike, whatever objects stand for it; of anything else, it."""
    if not isinstance(value, Tensor):
        return id(value)
    return value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), str(value.device)


def _has(root: Any, path: str) -> bool:
    for part in path.split("."):
        if not hasattr(root, part):
            return False
        root = getattr(root, part)
    return True


def _container(root: nn.Module, path: str, kind: type[nn.Module] = nn.Module) -> tuple[nn.Module, str]:
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
    """Hold a tensor under a dotted path; modules on the way that are not there are made, of that kind."""
    owner, leaf = _container(root, path, kind)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor, persistent=persistent)


def attach(root: nn.Module, path: str, value: Any) -> None:
    """Put anything at a dotted path; modules on the way that are not there are made."""
    owner, leaf = _container(root, path)
    setattr(owner, leaf, value)
