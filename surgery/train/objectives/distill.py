"""distill: train a program to reproduce the outputs of a teacher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field, field_validator, model_validator
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from surgery.capture.shapes import input_names
from surgery.common.errors import LoadError, TrainingError
from surgery.engine.program import Program
from surgery.store.load import load
from surgery.train.data_context import Row, Setting
from surgery.train.learned import LEARNED, Learned
from surgery.train.nested_objective import Nested, nested_of, score_of, under
from surgery.train.objective import Batch, Objective, output, run
from surgery.train.objectives.regression import Regression
from surgery.train.taps import Taps
from surgery.train.texts import TEXT_OR_IMAGE, read
from surgery.train.tokenizers import find_tokenizer
from surgery.train.tokens import IGNORED

if TYPE_CHECKING:
    from surgery.train.examples import Examples


class Distill(Objective):
    """Distillation of a teacher into the program (Hinton et al. 2015, arXiv:1503.02531).

    With the logits z of the program and z' of the teacher, the loss is

        L = (1 − α) · hard + α · T² · KL(softmax(z' / T) ‖ softmax(z / T)) + w · Σ hints

    The hard loss is that of --of, another objective with its own options (`--of classification,label=stars`,
    `causal-lm`, `sft`, …). Rows and metrics are also those of --of. For texts without labels use `--of unlabelled`
    with --alpha 1. For logits per token, only tokens with a label count. With regression the soft term is the squared
    distance.

    --teacher is a directory that surgery saved, or any reference that surgery can load (`hf:DIR`, with --teacher-task
    text-classification). It must read the same tokens. It runs in eval mode without gradients, and is not saved. The
    program may be smaller, for example with fewer layers (model_kwargs) or pruned.

    `--hint STUDENT=TEACHER` matches the outputs of two modules (FitNets, Romero et al. 2015, arXiv:1412.6550;
    TinyBERT, Jiao et al. 2020, arXiv:1909.10351). The hint is the squared distance, averaged over features and
    unmasked tokens. If the widths differ, a linear map of the student's output is learned; it is saved in checkpoints
    but not with the program. `--attention STUDENT=TEACHER` matches the attention scores q kᵀ before the softmax, as
    in TinyBERT. Both modules must have the same number of heads, and the program then trains as its graph. Names are
    module paths, their ends, or targets of one site.

    The metrics are those of --of, with its loss as `hard`; soft and hints; agreement, the share of equal predictions
    of both; and the teacher's own result, such as teacher/accuracy. The score selects the best checkpoint (highest):
    it is the metric that selects the best checkpoint of --of, negated if smaller is better, or the agreement if there
    are no labels.
    """

    name: ClassVar[str] = "distill"
    example: ClassVar[str] = (
        "surgery train hf:google-bert/bert-base-uncased --objective classification --data reviews.csv "
        "-o teacher/\n"
        "surgery train hf:google-bert/bert-base-uncased --task text-classification --objective "
        "distill --teacher teacher/ --data reviews.csv -o student/"
    )
    metric: ClassVar[str] = "score"
    larger: ClassVar[bool] = True

    teacher: str = Field(
        default="", description="teacher: a directory that surgery saved, or a reference such as hf:DIR"
    )
    teacher_task: str | None = Field(
        default=None, description="transformers task of the teacher, if it is loaded with hf:"
    )
    of: str = Field(
        default="classification",
        description="OBJECTIVE[,OPTION=VALUE…] for the labels; unlabelled: no labels",
    )
    temperature: float = Field(default=2.0, gt=0, description="temperature T that softens both distributions")
    alpha: float = Field(default=0.5, ge=0, le=1, description="weight of the soft targets; 1: no hard labels")
    hint: tuple[str, ...] = Field(
        default=(), description="STUDENT=TEACHER, modules whose outputs to match; may be repeated"
    )
    attention: tuple[str, ...] = Field(
        default=(), description="STUDENT=TEACHER, modules whose attention scores to match; may be repeated"
    )
    hint_weight: float = Field(default=1.0, gt=0, description="weight w of each hint")

    @field_validator("hint", "attention", mode="before")
    @classmethod
    def _pairs(cls, given: Any) -> Any:
        pairs = (given,) if isinstance(given, str) else tuple(given)
        for text in pairs:
            if not isinstance(text, str) or not all(text.partition("=")):
                raise ValueError("write STUDENT=TEACHER, with a module of each")
        return pairs

    @model_validator(mode="after")
    def _goes_together(self) -> Distill:
        if not self.teacher:
            raise ValueError(
                "give a --teacher: a directory that surgery saved, or a reference such as hf:DIR"
            )
        if nested_of(self.of)["objective"] == Unlabelled.name and self.alpha != 1:
            raise ValueError("--of unlabelled has no hard labels; set --alpha 1")
        return self

    @cached_property
    def base(self) -> Objective:
        """The objective of the hard labels."""
        made = nested_of(self.of)
        if made["objective"] == Unlabelled.name:
            return Unlabelled.parse(dict(made["options"]))
        return Nested(**made).made("--of")

    def taught_by(self, program: Program) -> Distill:
        """Return this objective with a loaded program as teacher. It replaces `teacher`."""
        made = self.model_copy()
        made.__dict__["loaded"] = program
        return made

    @cached_property
    def loaded(self) -> Program:
        """The loaded teacher.

        Raises:
            TrainingError: the teacher cannot be loaded.
        """
        try:
            return load(self.teacher, task=self.teacher_task)
        except LoadError as error:
            raise TrainingError(f"--teacher {self.teacher}: {error}") from None

    @property
    def output(self) -> str:
        """Name of the output that is compared."""
        return getattr(self.base, "output", "logits")

    # -- data: that of the objective of the hard labels

    def outputs_for(self, rows: Any) -> int | None:
        return self.base.outputs_for(rows)

    def prepared(self, rows: Any, setting: Setting) -> Setting:
        name = self.output
        theirs = Setting.of(self.loaded, find_tokenizer(self.loaded), setting.longest)
        setting = self._named_alike(setting, theirs)
        own = self.base.prepared(rows, setting)
        width = setting.width(name, self.name)
        given = theirs.widths.get(
            name, next(iter(theirs.widths.values())) if len(theirs.widths) == 1 else None
        )
        if given is None:
            raise TrainingError(
                f"the teacher has no output {name!r}, only {', '.join(theirs.widths)}; load it with --teacher-task"
            )
        if given != width:
            raise TrainingError(
                f"the teacher's {name!r} has {given} classes, but the program's has {width}; give the program as many "
                f"with --pass head --labels {given}"
            )
        more = [each for each in theirs.inputs if each not in setting.inputs]
        if more:
            raise TrainingError(
                f"the teacher takes {more[0]!r}, but the program only {', '.join(setting.inputs)}; use a teacher with "
                f"the same inputs"
            )
        if theirs.tokenizer is not None and theirs.tokenizer.get_vocab() != setting.tokenizer.get_vocab():
            raise TrainingError(
                "the teacher's tokenizer differs from the program's; use a teacher with the same tokenizer"
            )
        if theirs.images != setting.images:
            raise TrainingError(
                "the teacher's image format differs from the program's; use a teacher with the same format"
            )
        if theirs.fixed not in (None, setting.fixed):
            raise TrainingError(
                f"the teacher accepts only {theirs.fixed} tokens; use a teacher that accepts any length"
            )
        return replace(own, longest=min(own.longest, theirs.longest))

    def _named_alike(self, setting: Setting, theirs: Setting) -> Setting:
        """Return the setting with the teacher's class names, whose numbers its outputs have.

        Raises:
            TrainingError: the program has other names.
        """
        taught = theirs.labels.get(self.output) if self.output in setting.widths else None
        own = setting.labels.get(self.output)
        if taught and own and taught != own:
            raise TrainingError(
                f"the teacher's classes are {', '.join(taught)}, and the program's are {', '.join(own)}; give the "
                f"program a new head with --pass head --labels {len(taught)}"
            )
        return replace(setting, labels={**setting.labels, self.output: taught}) if taught else setting

    def labels(self, setting: Setting) -> dict[str, tuple[str, ...]]:
        taught = {self.output: setting.labels[self.output]} if self.output in setting.labels else {}
        return {**taught, **self.base.labels(setting)}

    def notes(self, setting: Setting) -> list[str]:
        return self.base.notes(setting)

    def examples(self, row: Row, setting: Setting) -> Iterable[Row]:
        return self.base.examples(row, setting)

    def size(self, example: Row) -> int:
        return self.base.size(example)

    def epoch(self, data: Examples, batch: int, draw: Generator | None) -> list[list[int]]:
        return self.base.epoch(data, batch, draw)

    def collate(self, examples: Sequence[Row], setting: Setting, draw: Generator) -> Batch:
        return self.base.collate(examples, setting, draw)

    def terms(self, batch: Batch) -> int:
        return self.base.terms(batch)

    # -- the teacher

    def companions(self, program: Program) -> Mapping[str, nn.Module]:
        teacher = Teacher(self.loaded, program, _split(self.hint), _split(self.attention), self.output)
        maps = teacher.maps()
        return {"teacher": teacher, LEARNED: maps} if maps.linear else {"teacher": teacher}

    def complete(self, batch: Batch, companions: Mapping[str, nn.Module]) -> Batch:
        teacher = companions["teacher"]
        assert isinstance(teacher, Teacher)
        return {**batch, "teacher": teacher(batch), "taps": teacher.student, LEARNED: companions.get(LEARNED)}

    # -- losses

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        return self._terms(self._outputs(module, batch), batch)["loss"]

    def _outputs(self, module: nn.Module, batch: Batch) -> Any:
        """Run the module once. The taps capture the values for the hints."""
        with batch["taps"].watching(module):
            return run(module, batch)

    def _terms(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Return the loss and its parts."""
        logits, taught = self._counted(outputs, batch)
        soft = self._soft(logits, taught)
        # The nested objective calls a module itself. `_Given` hands it the outputs of the run that is already
        # done.
        hard = self.base.loss(_Given(outputs), batch) if self.alpha < 1 else torch.zeros_like(soft)
        found = {"soft": soft, "loss": (1 - self.alpha) * hard + self.alpha * soft}
        hints = self._hints(batch)
        if hints:
            found["hints"] = torch.stack(hints).sum()
            found["loss"] = found["loss"] + self.hint_weight * found["hints"]
        return found

    def _counted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits of program and teacher, one row per term of the loss."""
        logits, taught = output(outputs, self.output).float(), batch["teacher"]["logits"].float()
        labels = batch.get("labels")
        if logits.dim() == 3 and labels is not None:
            at = labels != IGNORED
            return logits[at], taught[at]
        return logits, taught

    def _soft(self, logits: Tensor, taught: Tensor) -> Tensor:
        if isinstance(self.base, Regression):
            return F.mse_loss(logits, taught)
        there, here = (
            F.log_softmax(taught / self.temperature, -1),
            F.log_softmax(logits / self.temperature, -1),
        )
        return F.kl_div(here, there, log_target=True, reduction="batchmean") * self.temperature**2

    def _hints(self, batch: Batch) -> list[Tensor]:
        seen, taps = batch["inputs"].get("attention_mask"), batch["taps"]
        found = []
        for i, (own, wanted) in enumerate(zip(taps.hidden(), batch["teacher"]["hidden"], strict=True)):
            maps = batch[LEARNED]
            own = maps(i, own.float()) if maps is not None else own.float()
            distance = (own - wanted.float()).square().mean(-1)
            whole = seen is None or distance.shape != seen.shape
            found.append(distance.mean() if whole else (distance * seen).sum() / seen.sum())
        for (own, at), (wanted, _) in zip(taps.scores(), batch["teacher"]["scores"], strict=True):
            distance = (own - wanted).square()
            there = torch.ones_like(distance, dtype=torch.bool)
            if seen is not None:
                there = there & seen.bool()[:, None, :, None] & seen.bool()[:, None, None, :]
            there = there if at is None else there & at
            found.append(distance[there].mean())
        return found

    # -- held-out data

    def observe(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        outputs = self._outputs(module, batch)
        logits, taught = self._counted(outputs, batch)
        seen = {f"own/{name}": value for name, value in self.base.observe(_Given(outputs), batch).items()}
        said = self.base.observe(_Given({self.output: batch["teacher"]["logits"]}), batch)
        seen.update({f"teacher/{name}": value for name, value in said.items()})
        seen.update(
            {name: value.expand(self.terms(batch)) for name, value in self._terms(outputs, batch).items()}
        )
        if not isinstance(self.base, Regression):
            seen["agreement"] = logits.argmax(-1) == taught.argmax(-1)
        return seen

    def metrics(self, observed: Mapping[str, Tensor]) -> dict[str, float]:
        figures = self.base.metrics(under("own/", observed))
        if "loss" in figures:
            figures["hard"] = figures.pop("loss")
        means = {name: float(v.double().mean()) for name, v in observed.items() if "/" not in name}
        figures.update(means)
        taught = self.base.metrics(under("teacher/", observed))
        if self.base.metric in taught:
            figures[f"teacher/{self.base.metric}"] = taught[self.base.metric]
        known = {**figures, "loss": figures["hard"]} if "hard" in figures else figures
        return {**figures, "score": score_of(self.base, known)}


class Teacher(nn.Module):
    """Runs the teacher on a batch and returns its logits, module outputs and attention scores."""

    def __init__(
        self,
        program: Program,
        student: Program,
        hints: Sequence[tuple[str, str]] = (),
        attentions: Sequence[tuple[str, str]] = (),
        name: str = "logits",
    ) -> None:
        """Prepare the teacher.

        Args:
            program: the teacher.
            student: program to train.
            hints: pairs of modules (student, teacher) whose outputs are compared.
            attentions: pairs of modules (student, teacher) whose attention scores are compared.
            name: output with the logits.

        Raises:
            TrainingError: modules of a pair have outputs of different rank, or different numbers of heads.
        """
        super().__init__()
        self.module, self.inputs, self.name = program.module().eval(), input_names(program.captured), name
        own, theirs = [a for a, _ in hints], [b for _, b in hints]
        self.student = Taps(student, own, [a for a, _ in attentions], "program")
        self.taps = Taps(program, theirs, [b for _, b in attentions], "teacher")
        for a, b in zip(self.student.modules, self.taps.modules, strict=True):
            ranks = self.student.ends[a].dim(), self.taps.ends[b].dim()
            if ranks[0] != ranks[1]:
                raise TrainingError(
                    f"--hint {a}={b}: the outputs have {ranks[0]} and {ranks[1]} axes; name modules with equal ones"
                )
        for a, b in zip(self.student.attentions, self.taps.attentions, strict=True):
            heads = self.student.heads[a], self.taps.heads[b]
            if heads[0] != heads[1]:
                raise TrainingError(
                    f"--attention {a}={b}: they have {heads[0]} and {heads[1]} heads; name modules with equally many"
                )

    def maps(self) -> WidthMaps:
        """Make the linear maps for hints whose widths differ."""
        pairs = zip(self.student.modules, self.taps.modules, strict=True)
        return WidthMaps([(self.student.ends[a].shape[-1], self.taps.ends[b].shape[-1]) for a, b in pairs])

    @torch.no_grad()
    def forward(self, batch: Batch) -> dict[str, Any]:
        inputs = batch["inputs"]
        with self.taps.watching(self.module):
            outputs = self.module(**{name: inputs[name] for name in self.inputs})
        return {
            "logits": output(outputs, self.name),
            "hidden": self.taps.hidden(),
            "scores": self.taps.scores(),
        }


class WidthMaps(Learned):
    """A learned linear map for each hint whose widths differ."""

    def __init__(self, widths: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.linear = nn.ModuleDict(
            {str(i): nn.Linear(a, b, bias=False) for i, (a, b) in enumerate(widths) if a != b}
        )

    def forward(self, number: int, value: Tensor) -> Tensor:
        return self.linear[str(number)](value) if str(number) in self.linear else value


class Unlabelled(Objective):
    """Texts or images without labels: the teacher's outputs are the only targets."""

    name: ClassVar[str] = "unlabelled"
    guesses: ClassVar[Mapping[str, tuple[str, ...]]] = {"text": TEXT_OR_IMAGE}
    metric: ClassVar[str] = "agreement"
    larger: ClassVar[bool] = True

    text: str | None = Field(default=None, description="column of the text or image")
    output: str = Field(default="logits", description="output of the model that is trained")

    def decide(self, rows: Any, setting: Setting) -> dict[str, Any]:
        setting.need_reader(self.name)
        return {}

    def examples(self, row: Row, setting: Setting) -> Iterable[Row]:
        yield read(row, setting)

    def collate(self, examples: Sequence[Row], setting: Setting, draw: Generator) -> Batch:
        return {"inputs": setting.pad(examples)}

    def terms(self, batch: Batch) -> int:
        return len(next(iter(batch["inputs"].values())))

    def observe(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {}

    def metrics(self, observed: Mapping[str, Tensor]) -> dict[str, float]:
        return {}


class _Given(nn.Module):
    """A module that returns stored outputs."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.outputs


def _split(pairs: Sequence[str]) -> list[tuple[str, str]]:
    return [(a, b) for a, _, b in (text.partition("=") for text in pairs)]
