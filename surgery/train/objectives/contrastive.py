"""contrastive: train embeddings so that texts or images that belong together are close."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from surgery.common.errors import TrainingError
from surgery.train.data_context import Row, Setting
from surgery.train.embeddings import Pooling, embedded, retrieval, similarities
from surgery.train.images import IMAGE, views
from surgery.train.objective import Batch, Objective, run
from surgery.train.texts import TEXT, read

ROLES = ("anchor", "positive", "negative")
ALONE = ("simcse", "simclr")  # both vectors of a pair come from the anchor


class Contrastive(Objective):
    """Contrastive learning of one embedding e per text or image, from pairs (a, p), or triples with a negative n.

    With s, the cosine similarity (or --similarity dot) divided by the temperature, the loss is

        infonce   L = −mean log (exp s(a, p) / Σ_c exp s(a, c))
        triplet   L = mean max(0, ‖a − p‖² − ‖a − n‖² + margin), for normalized vectors

    infonce (van den Oord et al. 2018, arXiv:1807.03748; as a ranking loss with in-batch negatives Henderson et al.
    2017, arXiv:1705.00652) uses all positives and negatives of the batch as candidates c. False negatives are
    excluded: a candidate with the same text as p, or the positive of an anchor with the same text as a. --symmetric
    adds the loss from positives to anchors.

    `--loss simcse` (Gao et al. 2021, arXiv:2104.08821) is infonce on texts alone. Each text runs through the model
    twice, and dropout makes the two vectors differ. `--loss simclr` (Chen et al. 2020, arXiv:2002.05709) is for
    images alone. It draws two random views of each image (cropped, mirrored, changed in brightness and contrast), and
    all other views of the batch are negatives. triplet (Schroff et al. 2015, arXiv:1503.03832) without a negative
    column uses the nearest text of the batch that is farther than p (semi-hard), or the farthest if there is none.
    With several processes, each uses the negatives of its own batch.

    e is an output, pooled over tokens if it has a token axis: `last_hidden_state`, or a projection added by passes.
    `--pass head --mode add --head-name proj --labels 128 --pool mean` with `--vector logits_proj` adds a linear one;
    `--pass expand --side dense --target path:head_proj --activation gelu` after it makes it non-linear.

    The metrics are the loss, the share of anchors whose own positive is the nearest of all held-out ones (accuracy),
    and the mean reciprocal rank of the own positive (mrr). The best checkpoint has the smallest loss. simcse is
    evaluated on two dropout views, or, if the data has positives, as infonce on the pairs without dropout. simclr is
    evaluated on two views.
    """

    name: ClassVar[str] = "contrastive"
    example: ClassVar[str] = (
        "surgery train hf:sentence-transformers/all-MiniLM-L6-v2 --objective contrastive --data "
        "pairs.jsonl -o encoder/"
    )
    guesses: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "anchor": (
            "anchor", "text1", "sentence1", "query", "question", "premise", "prompt", "instruction", *TEXT, *IMAGE,
        ),
        "positive": ("positive", "text2", "sentence2", "answer", "response", "entailment", "output", "paraphrase"),
        "negative": ("negative", "hard_negative", "text3", "sentence3", "contradiction"),
    }  # fmt: skip

    anchor: str | None = Field(default=None, description="column of the text or image")
    positive: str | None = Field(default=None, description="column of a text that belongs to the anchor")
    negative: str | None = Field(
        default=None, description="column of a text that does not belong to the anchor (optional)"
    )
    kind_of_loss: Literal["infonce", "simcse", "simclr", "triplet"] = Field(
        default="infonce", alias="loss", description="loss of a batch"
    )
    temperature: float = Field(
        default=0.05, gt=0, description="infonce, simcse, simclr: divisor of the similarities"
    )
    margin: float = Field(
        default=0.2, gt=0, description="triplet: required difference of the squared distances"
    )
    similarity: Literal["cos", "dot"] = Field(
        default="cos", description="infonce, simcse, simclr: cosine or dot product"
    )
    crop: float = Field(
        default=0.35, gt=0, le=1, description="simclr: smallest area of a view, as a share of the image"
    )
    keep_sides: bool = Field(default=False, description="simclr: never mirror views (for images of text)")
    symmetric: bool = Field(default=False, description="infonce: add the loss from positives to anchors")
    pooling: Pooling = Field(
        default="mean",
        description="pooling of token outputs: the mean over unmasked tokens, or the first token",
    )
    vector: str = Field(
        default="last_hidden_state", description="output of the model that is the embedding e"
    )

    @model_validator(mode="after")
    def _goes_together(self) -> Contrastive:
        if self.symmetric and self.kind_of_loss != "infonce":
            raise ValueError(f"--symmetric needs --loss infonce, not {self.kind_of_loss}; leave it out")
        if self.similarity == "dot" and self.kind_of_loss == "triplet":
            raise ValueError("--loss triplet uses normalized vectors; leave out --similarity dot")
        if self.negative is not None and self.kind_of_loss in ALONE:
            raise ValueError(f"--loss {self.kind_of_loss} uses no negative column; leave out --negative")
        return self

    # -- data

    def columns(self, available: Sequence[str]) -> dict[str, str]:
        found = self.named_columns(available)
        if self.kind_of_loss in ALONE:
            found.pop("negative", None)
        if self.kind_of_loss == "simclr":
            found.pop("positive", None)
        for option in ("anchor", "positive"):
            if option not in found and not (option == "positive" and self.kind_of_loss in ALONE):
                raise TrainingError(
                    f"objective {self.name!r}: no column looks like the {option}; the data has "
                    f"{', '.join(available)}; name one with --{option}"
                    + (
                        ", or use --loss simcse for texts alone, simclr for images"
                        if option == "positive"
                        else ""
                    )
                )
        return found

    def decide(self, rows: Any, setting: Setting) -> dict[str, Any]:
        setting.need_reader(self.name)
        if self.kind_of_loss == "simclr" and setting.images is None:
            raise TrainingError(
                f"--loss simclr needs images, but the model takes {', '.join(setting.inputs)}; use another loss"
            )
        named = "vector" in self.model_fields_set
        if self.vector not in setting.widths and (named or len(setting.widths) != 1):
            raise TrainingError(
                f"objective {self.name!r}: the model has no output {self.vector!r}, only "
                f"{', '.join(setting.widths)}; name one with --vector, or add one with --pass head --mode add "
                f"--pool mean"
            )
        return {"roles": [role for role in ROLES if role in setting.columns]}

    def examples(self, row: Row, setting: Setting) -> Iterable[Row]:
        kind = _kind(setting)
        yield {role: read(row, setting, role)[kind] for role in setting.decided["roles"]}

    def size(self, example: Row) -> int:
        return max(len(example[role]) for role in ROLES if role in example)

    def batches(self, sizes: Sequence[int], batch: int, draw: Generator) -> list[list[int]]:
        if batch < 2 and self.kind_of_loss != "triplet":
            raise TrainingError(
                f"--loss {self.kind_of_loss} takes its negatives from the batch; give a --batch of 2 or more"
            )
        return super().batches(sizes, batch, draw)

    def collate(self, examples: Sequence[Row], setting: Setting, draw: Generator) -> Batch:
        roles, kind = setting.decided["roles"], _kind(setting)
        parts = {role: [_plain(e[role]) for e in examples] for role in roles}
        anchors, pairs = parts["anchor"], "positive" in roles
        if self.kind_of_loss == "simclr" and setting.images is not None:
            pixels = setting.images.pixels(anchors)
            both = [views(pixels, draw, self.crop, not self.keep_sides) for _ in range(2)]
            inputs = setting.images.inputs(torch.cat(both))
        else:
            inputs = setting.pad([{kind: each} for role in roles for each in parts[role]])
        return {
            "inputs": inputs,
            "roles": ["anchor", "positive"] if self.kind_of_loss == "simclr" else roles,
            "false": _false_negatives(anchors, parts["positive"], parts.get("negative", []))
            if pairs
            else None,
            "alone": _false_negatives(anchors, anchors, []),
            "seed": int(torch.randint(2**62, (), generator=draw)),
        }

    def terms(self, batch: Batch) -> int:
        return len(batch["alone"])

    # -- losses

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        if self.kind_of_loss == "simcse":
            views = self._views(module, batch)
            if module.training and torch.equal(*views):
                raise TrainingError(
                    "--loss simcse: the two views of a text are equal because the model has no active dropout; load it "
                    "with dropout (--model-kwargs), or use pairs with --loss infonce"
                )
            return self._infonce(*views, None, batch["alone"])
        return self._of_pairs(self._vectors(module, batch), batch)

    def _vectors(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the vectors of each role."""
        found = embedded(run(module, batch), self.vector, self.pooling, batch)
        return dict(zip(batch["roles"], found.chunk(len(batch["roles"])), strict=True))

    def _views(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return two vectors per anchor.

        One run over the doubled batch gives both, as dropout differs between rows.
        """
        count = self.terms(batch)
        inputs = {name: torch.cat([values[:count]] * 2) for name, values in batch["inputs"].items()}
        twice = {"inputs": inputs}
        first, second = embedded(run(module, twice), self.vector, self.pooling, twice).chunk(2)
        return first, second

    def _of_pairs(self, vectors: Mapping[str, Tensor], batch: Batch) -> Tensor:
        anchors, positives, negatives = vectors["anchor"], vectors["positive"], vectors.get("negative")
        if self.kind_of_loss == "simclr":
            return self._nt_xent(anchors, positives, batch["alone"])
        if self.kind_of_loss == "triplet":
            return self._triplet(anchors, positives, negatives, batch["false"])
        found = self._infonce(anchors, positives, negatives, batch["false"])
        if not self.symmetric:
            return found
        return (found + self._infonce(positives, anchors, None, batch["false"][:, : len(anchors)].T)) / 2

    def _infonce(self, a: Tensor, p: Tensor, n: Tensor | None, false: Tensor) -> Tensor:
        candidates = p if n is None else torch.cat([p, n])
        scores = similarities(a, candidates, self.similarity) / self.temperature
        scores = scores.masked_fill(false, -torch.inf)
        return F.cross_entropy(scores, torch.arange(len(a), device=a.device))

    def _nt_xent(self, a: Tensor, p: Tensor, same: Tensor) -> Tensor:
        """Return the NT-Xent loss: each view must find the other view of its image.

        Views of equal images are excluded from the candidates.
        """
        every, own = torch.cat([a, p]), torch.arange(len(a), device=a.device)
        scores = similarities(every, every, self.similarity) / self.temperature
        itself = torch.eye(len(a), dtype=torch.bool, device=a.device) | same
        scores = scores.masked_fill(
            torch.cat([torch.cat([itself, same], 1), torch.cat([same, itself], 1)]), -torch.inf
        )
        return F.cross_entropy(scores, torch.cat([own + len(a), own]))

    def _triplet(self, a: Tensor, p: Tensor, n: Tensor | None, false: Tensor) -> Tensor:
        a, p = F.normalize(a, dim=-1), F.normalize(p, dim=-1)
        near = (a - p).square().sum(-1)
        if n is not None:
            far = (a - F.normalize(n, dim=-1)).square().sum(-1)
        else:
            far = _semi_hard(near, 2 - 2 * a @ p.T, false)
        return F.relu(near - far + self.margin).mean()

    # -- held-out data

    def observe(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if self.kind_of_loss == "simcse" and "positive" not in batch["roles"]:
            # Dropout is the only difference between the views, so it must be active here. The seed keeps
            # evaluations comparable.
            with torch.random.fork_rng():
                torch.manual_seed(batch["seed"])
                module.train()
                a, p = self._views(module, batch)
                module.eval()
            loss = self._infonce(a, p, None, batch["alone"])
        else:
            vectors = self._vectors(module, batch)
            a, p = vectors["anchor"], vectors["positive"]
            loss = self._of_pairs(vectors, batch)
        return {"anchors": a, "positives": p, "losses": loss.expand(len(a))}

    def metrics(self, observed: Mapping[str, Tensor]) -> dict[str, float]:
        kind = "cos" if self.kind_of_loss == "triplet" else self.similarity
        found = retrieval(observed["anchors"], observed["positives"], kind)
        return {"loss": float(observed["losses"].double().mean()), **found}


def _kind(setting: Setting) -> str:
    return "input_ids" if setting.images is None else "pixels"


def _plain(value: Any) -> Any:
    """Return tokens as a list, and pixels (bytes) unchanged."""
    return value if isinstance(value, bytes) else list(value)


def _false_negatives(anchors: list[Any], positives: list[Any], negatives: list[Any]) -> Tensor:
    """Return a mask of candidates that are false negatives, anchors × (positives, then negatives).

    An anchor's own positive is never masked.
    """
    rows = []
    for i, (anchor, positive) in enumerate(zip(anchors, positives, strict=True)):
        same = [j != i and (positives[j] == positive or anchors[j] == anchor) for j in range(len(positives))]
        rows.append([*same, *(text == positive for text in negatives)])
    return torch.tensor(rows)


def _semi_hard(near: Tensor, distances: Tensor, false: Tensor) -> Tensor:
    """Return the distance of a negative for each anchor: the smallest above `near`, or else the largest.

    An anchor without negatives gets an infinite distance, so its loss is zero.
    """
    own = torch.eye(len(near), dtype=torch.bool, device=near.device)
    out = own | false[:, : len(near)]
    beyond = distances.masked_fill(out | (distances <= near.unsqueeze(1)), torch.inf).amin(1)
    farthest = distances.masked_fill(out, -torch.inf).amax(1)
    far = torch.where(beyond.isinf(), farthest, beyond)
    return torch.where(far.isinf(), torch.full_like(far, torch.inf), far)
