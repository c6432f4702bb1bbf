"""Files of version 0.1.0: directories of every pass, PEFT checkpoints and recipes give the same bits now.

They are in tests/fixtures/v0_1, whose `make` describes each case and is never run again. A case that fails here is a
user's directory that this version reads differently.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor
from torch.utils import _pytree as pytree

import surgery
from tests.fixtures.v0_1 import bases
from tests.fixtures.v0_1.facts import described, digests, digests_in_one, leaves, plain_outputs

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0_1"
ROOT = FIXTURES.parents[2]
INDEX = json.loads((FIXTURES / "index.json").read_text())
SPECIAL = ("special", "peft", "recipes")
# A capture of these takes a second or a good part of it. What else stands on them is marked slow: its passes are
# tried on smaller bases too.
LARGE = {
    "hf-llama": ("llama-lora", "llama-prefix-shift", "llama-prompt", "llama-vocab"),
    "hf-bert": ("bert-head-add", "bert-prefix", "bert-smooth"),
    "hf-gpt2": ("gpt2-fuse-gelu", "gpt2-lora-parts", "gpt2-split-qkv"),
    "hf-t5": ("t5-prefix-cross",),
    "decoder": (
        "decoder-prefix", "decoder-prompt", "decoder-side-conv", "decoder-vocab", "fuse-all-lora",
        "fuse-attention", "fuse-gelu", "fuse-qkv", "fuse-rmsnorm",
    ),
}  # fmt: skip
SAVED = [
    pytest.param(
        group, name, id=f"{group}-{name}", marks=[pytest.mark.slow] * (name not in LARGE.get(group, names))
    )
    for group, names in INDEX.items()
    if group not in SPECIAL
    for name in names
]
LIVE = [name for name in INDEX["special"] if name.startswith("live-")]
TOLERANCE = {torch.bfloat16: 3e-2}  # eight bits; of fp32 1e-5, over the largest value
PLUGINS = {"ia3": "torch-surgery-ia3", "int8-static": "torch-surgery-torchao"}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """group -> the folder of its cases."""
    top = tmp_path_factory.mktemp("v0_1")

    @cache
    def folder(group: str) -> Path:
        with tarfile.open(FIXTURES / "cases" / f"{group}.tar.xz") as archive:
            archive.extractall(top / group, filter="data")
        return top / group

    return folder


@pytest.fixture(scope="module")
def exact() -> bool:
    """True if this machine rounds as the one that wrote the cases: its sums have the same last bits.

    Sums of floats depend on the order in which vector units and BLAS add, so on other machines the last bits of outputs
    may differ although this code is correct. Only plain torch on the modules of all cases decides this; code of this
    package takes no part, so it cannot hide its own faults. Stored weights must be restored bit for bit on any machine.
    """
    stored = tensors_of(FIXTURES / "machine.safetensors")
    return all(
        torch.equal(plain_outputs(*factory()[:2])[0], stored[factory.__name__]) for factory in bases.FACTORIES
    )


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Cloned: where a file's tensors lie in memory decides the order in which small products are summed."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


class Case:
    """A case's folder: the saved directory, what it is to be, and the outputs that it gave."""

    def __init__(self, folder: Path, exact: bool) -> None:
        self.saved = folder / "saved"
        self.facts = json.loads((folder / "facts.json").read_text())
        self.outputs = tensors_of(folder / "outputs.safetensors")
        self.exact = exact

    def base(self) -> str:
        """Reference of the case's base, for any working directory."""
        return here(self.facts["base"])

    def group(self, name: str) -> list[Tensor]:
        """name0, name1, … of the outputs."""
        found = []
        while (key := f"{name}{len(found)}") in self.outputs:
            found.append(self.outputs[key])
        return found

    def run(self, program: surgery.Program, inputs: str = "in") -> list[Tensor]:
        """Outputs of a program on the inputs of the case, in the places of its example inputs."""
        spec = pytree.tree_structure(program.example_inputs)
        args, kwargs = pytree.tree_unflatten(self.group(inputs), spec)
        return leaves(program.run(*args, **kwargs))

    def same(self, got: list[Tensor], name: str) -> None:
        expected = self.group(name)
        assert [t.shape for t in got] == [t.shape for t in expected]
        assert [t.dtype for t in got] == [t.dtype for t in expected]
        for one, other in zip(got, expected, strict=True):
            if self.exact:
                assert torch.equal(one, other), f"{name}: {float((one - other).abs().max())} apart"
            else:
                close(one, other)

    def check_state(self, program: surgery.Program) -> None:
        """Every tensor bit for bit, but those computed here (folded, or made by the module) on another machine."""
        computed = {*self.facts["folded"], *self.facts["made"]}
        state, expected = digests(program.state()), self.facts["state"]
        assert state.keys() == expected.keys()
        moved = {name for name, value in state.items() if value != expected[name]}
        assert not (moved if self.exact else moved - computed)

    def check_base(self, undone: surgery.Program) -> None:
        """Check that a program without its passes is the original base."""
        kept = {name: t for name, t in undone.state().items() if name not in self.facts["made"]}
        assert digests_in_one(kept) == self.facts["base_state"]
        self.same(self.run(undone), "base")

    def check_described(self, program: surgery.Program) -> None:
        said = described(program)
        assert said == {key: self.facts[key] for key in said}

    def check(self, program: surgery.Program) -> None:
        self.check_described(program)
        self.check_state(program)
        self.same(self.run(program), "out")
        if self.group("new"):  # with tokens that the base does not know
            self.same(self.run(program, "new"), "newout")
        self.check_base(program.undo_all())


def close(got: Tensor, expected: Tensor) -> None:
    allowed = TOLERANCE.get(expected.dtype, 1e-5) * max(1.0, float(expected.abs().max()))
    assert float((got - expected).abs().max()) <= allowed


def here(ref: str) -> str:
    return f"hf:{ROOT / ref.removeprefix('hf:')}" if ref.startswith("hf:") else ref


@pytest.fixture
def case(unpacked: Callable[[str], Path], exact: bool) -> Callable[[str, str], Case]:
    return lambda group, name: Case(unpacked(group) / name, exact)


@pytest.fixture(scope="module")
def loaded() -> Callable[[str], surgery.Program]:
    """reference -> its program, captured once."""
    return cache(surgery.load)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As when they were made: threads share sums out in other portions."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def require_plugins(facts: dict[str, Any]) -> None:
    """Skip a case of a plugin that is not installed."""
    for entry in facts["journal"]:
        if (plugin := PLUGINS.get(entry.partition(":")[0])) is not None:
            try:
                distribution(plugin)
            except PackageNotFoundError:
                pytest.skip(f"{plugin} is not installed")


@pytest.mark.parametrize(("group", "name"), SAVED)
def test_a_saved_directory(group: str, name: str, case: Callable[[str, str], Case]) -> None:
    found = case(group, name)
    require_plugins(found.facts)
    found.check(surgery.load(str(found.saved), base=found.base()))


def test_every_pass_has_a_case(unpacked: Callable[[str], Path]) -> None:
    """Every pass of version 0.1.0 has a case."""
    seen = set()
    for group, names in INDEX.items():
        for name in names:
            facts = json.loads((unpacked(group) / name / "facts.json").read_text())
            seen |= {entry.partition(":")[0] for entry in facts["journal"]}
    assert seen - {"merge"} >= set(json.loads((FIXTURES / "passes.json").read_text()))


def test_a_head_that_no_file_of_the_base_holds(case: Callable[[str, str], Case]) -> None:
    found = case("special", "new-head")
    found.check(surgery.load(str(found.saved), base=found.base()))


def test_a_standalone_directory(case: Callable[[str, str], Case]) -> None:
    found = case("special", "standalone")
    found.check(surgery.load(str(found.saved)))


def test_a_directory_of_a_module_from_python(case: Callable[[str, str], Case]) -> None:
    found = case("special", "module-given")
    found.check(surgery.load(str(found.saved), base=surgery.capture(*bases.stack())))


@pytest.mark.parametrize("name", LIVE)
def test_a_live_modules_directory(name: str, case: Callable[[str, str], Case]) -> None:
    found = case("special", name)
    require_plugins(found.facts)
    found.check(surgery.load(str(found.saved), base=found.base()))
    # And put on a module again, whose own forward stays in charge.
    factory = found.base().replace("/", ":").rpartition(":")[2]
    module, inputs, *_ = getattr(bases, factory)()
    surgery.load_(module, found.saved, inputs=None if found.base().startswith("hf:") else inputs)
    given = pytree.tree_unflatten(found.group("given"), pytree.tree_structure(inputs))
    found.same(plain_outputs(module, given), "live")
    surgery.remove_(module)
    found.outputs["plain0"] = tensors_of(FIXTURES / "machine.safetensors")[factory]
    found.same(plain_outputs(module, given), "plain")


@pytest.mark.parametrize("name", INDEX["peft"])
def test_a_peft_checkpoint(
    name: str, case: Callable[[str, str], Case], loaded: Callable[[str], surgery.Program], tmp_path: Path
) -> None:
    found = case("peft", name)
    require_plugins(found.facts)
    program = surgery.import_peft(found.saved, loaded(found.base()))
    found.check(program)
    close(found.run(program)[0], found.group("peft")[0])
    surgery.export_peft(program, tmp_path / "ours")
    assert digests(tensors_of(tmp_path / "ours" / "adapter_model.safetensors")) == found.facts["exported"]


@pytest.mark.parametrize("name", INDEX["recipes"])
def test_a_recipe(
    name: str, case: Callable[[str, str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command reads and runs it; its seed determines random initial values."""
    found = case("recipes", name)
    require_plugins(found.facts)
    monkeypatch.chdir(ROOT)  # a recipe's paths are read from where it is run
    recipe, out = FIXTURES / "recipes" / f"{name}.yaml", tmp_path / "made"
    runs, model = name.startswith("run-"), yaml.safe_load(recipe.read_text())["model"]
    (command,) = entry_points(group="console_scripts", name="surgery")
    words = ["run", str(recipe)] if runs else ["apply", "--recipe", str(recipe)]
    with pytest.raises(SystemExit) as done:
        command.load()([*words, *([model] if model.startswith("py:") else []), "-o", str(out)])
    assert not done.value.code
    program = surgery.load(str(out / "finished" if runs else out), base=None if runs else here(model))
    found.check_described(program)
    if found.exact:  # elsewhere what starts at random, and so what is rounded to codes, differs in last bits
        found.check(program)
