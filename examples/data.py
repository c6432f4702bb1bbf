"""Data for the examples: downloads pinned source packages with pip, checks sha256, caches them outside the tree.

    film, product, tweets, editorial   sentences rated by people from -4 to 4 (vaderSentiment, MIT licence)
    alpaca_en                          999 instructions with answers (LLaMA-Factory's demo, Apache 2.0)
    dpo_en                             300 dialogues with a better and a worse answer (same source)
    wiki                               30 Wikipedia articles (same source, from the Wikipedia dump, CC BY-SA)
    lee                                50 documents; people rated the similarity of each pair (gensim's test data)

    python examples/data.py NAME FILE.jsonl    writes a data set as rows that `surgery train` reads

The cache is $SURGERY_CACHE, or ~/.cache/torch-surgery.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NEUTRAL = 0.5  # Sentences with a mean rating strictly between -0.5 and 0.5 get no label.


class DataError(Exception):
    """Data cannot be downloaded, or differs from the pinned version."""


@dataclass(frozen=True)
class Source:
    """A source package on PyPI."""

    name: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        return f"{self.name}-{self.version}.tar.gz"


VADER = Source("vaderSentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9")
ALPACA = Source("llamafactory", "0.9.5", "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f")

GENSIM = Source("gensim", "4.4.0", "a3f5b626da5518e79a479140361c663089fe7998df8ba52d56e1ded71ac5bdf5")

RATINGS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
DOMAINS = {
    "film": "movieReviewSnippets",
    "product": "amazonReviewSnippets",
    "tweets": "tweets",
    "editorial": "nytEditorialSnippets",
}


@dataclass(frozen=True)
class Sentence:
    """A rated sentence.

    Attributes:
        text: The sentence.
        rating: Mean of about 20 ratings, from -4 to 4.
    """

    text: str
    rating: float

    @property
    def label(self) -> int:
        return int(self.rating > 0)


@dataclass(frozen=True)
class Split:
    train: list[Sentence]
    held_out: list[Sentence]


@dataclass(frozen=True)
class Instruction:
    prompt: str
    answer: str


def sentences(domain: str = "film") -> list[Sentence]:
    """Rated sentences of a domain, in file order."""
    if domain not in DOMAINS:
        raise DataError(f"there is no domain {domain!r}; there are {', '.join(DOMAINS)}")
    outer = _member(fetch(VADER), RATINGS)
    table = _member(io.BytesIO(outer), f"hutto_ICWSM_2014/{DOMAINS[domain]}_GroundTruth.txt")
    rows = (line.split("\t", 2) for line in table.decode("utf-8").splitlines() if line.strip())
    return [Sentence(text.strip(), float(rating)) for _, rating, text in rows]


def sentiment(domain: str = "film", held_out: float = 0.2, seed: int = 0) -> Split:
    """Positive and negative sentences, split deterministically for a seed.

    Sentences that differ only in case, spacing and punctuation count as one, so no sentence is on both sides.
    """
    distinct = {" ".join(re.findall(r"\w+", s.text.lower())): s for s in reversed(sentences(domain))}
    kept = [s for s in reversed(distinct.values()) if abs(s.rating) >= NEUTRAL]
    random.Random(seed).shuffle(kept)
    size = round(len(kept) * held_out)
    return Split(kept[size:], kept[:size])


def alpaca_en() -> list[Instruction]:
    """Instructions with reference answers."""
    rows = json.loads(_member(fetch(ALPACA), "llamafactory-0.9.5/data/alpaca_en_demo.json"))
    return [Instruction(f"{r['instruction']}\n\n{r['input']}".strip(), r["output"]) for r in rows]


def dpo_en() -> list[dict[str, object]]:
    """Dialogues as messages, each with a preferred and a rejected answer."""
    rows = json.loads(_member(fetch(ALPACA), "llamafactory-0.9.5/data/dpo_en_demo.json"))
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    return [
        {
            "prompt": [{"role": roles[m["from"]], "content": m["value"]} for m in row["conversations"]],
            "chosen": row["chosen"]["value"],
            "rejected": row["rejected"]["value"],
        }
        for row in rows
    ]


def wiki() -> list[str]:
    """Articles, one string each."""
    return _member(fetch(ALPACA), "llamafactory-0.9.5/data/wiki_demo.txt").decode("utf-8").splitlines()


def lee() -> tuple[list[str], list[list[float]]]:
    """Documents and a matrix of similarities: means of about ten people's ratings (Lee, Pincombe and Welsh 2005)."""
    folder = "gensim-4.4.0/gensim/test/test_data"
    documents = _member(fetch(GENSIM), f"{folder}/lee.cor").decode("utf-8", "replace").splitlines()
    rows = _member(fetch(GENSIM), f"{folder}/similarities0-1.txt").decode("ascii").splitlines()
    return documents, [[float(value) for value in row.split()] for row in rows]


def cache_folder() -> Path:
    return Path(os.environ.get("SURGERY_CACHE") or Path.home() / ".cache" / "torch-surgery")


def fetch(source: Source) -> Path:
    """Path of the source package in the cache; pip downloads it if it is missing.

    Raises:
        DataError: the download fails, or the file is not the pinned one.
    """
    path = cache_folder() / source.file
    if path.is_file() and sha256(path) == source.sha256:
        return path
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    requirement = f"{source.name}=={source.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-binary", source.name, "--dest", str(path.parent)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True)
    if done.returncode or not path.is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["pip gave no reason"]
        raise DataError(
            f"pip could not download {requirement}: {said[-1].strip()} (needed once: the file is then kept in "
            f"{path.parent})"
        )
    found = sha256(path)
    if found != source.sha256:
        path.unlink()
        raise DataError(
            f"{source.file} is not the pinned file: its sha256 is {found}; it was deleted, so run this again"
        )
    return path


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _member(archive: Path | io.BytesIO, name: str) -> bytes:
    """Content of one file of a tar archive; nothing is extracted to disk."""
    with tarfile.open(archive) if isinstance(archive, Path) else tarfile.open(fileobj=archive) as tar:
        stream = tar.extractfile(name)
        if stream is None:
            raise DataError(f"{name} is not a file")
        return stream.read()


def batches(count: int, size: int, lengths: list[int], rng: random.Random) -> Iterator[list[int]]:
    """One shuffled epoch of indices, in batches of similar length to reduce padding.

    Args:
        count: Number of examples.
        size: Examples per batch.
        lengths: Length of each example.
        rng: Random generator for the order.
    """
    order = list(range(count))
    rng.shuffle(order)
    chunk = size * 16
    groups = [sorted(order[i : i + chunk], key=lengths.__getitem__) for i in range(0, count, chunk)]
    ready = [group[i : i + size] for group in groups for i in range(0, len(group), size)]
    rng.shuffle(ready)
    yield from ready


def rows(name: str) -> list[dict[str, object]]:
    """Rows of a data set, with the columns that objectives expect.

    Raises:
        DataError: there is no data set of that name.
    """
    if name in DOMAINS:
        split = sentiment(name)
        return [{"text": s.text, "label": s.label} for s in (*split.train, *split.held_out)]
    if name == "alpaca_en":
        return [{"prompt": row.prompt, "response": row.answer} for row in alpaca_en()]
    if name == "dpo_en":
        return dpo_en()
    if name == "wiki":
        return [{"text": article} for article in wiki()]
    raise DataError(f"there is no data set {name!r}; there are {', '.join(DOMAINS)}, alpaca_en, dpo_en, wiki")


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python examples/data.py NAME FILE.jsonl", file=sys.stderr)
        return 2
    name, target = arguments[0], Path(arguments[1])
    try:
        lines = [json.dumps(row) + "\n" for row in rows(name)]
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(lines))
    print(f"{len(lines):,} rows of {name} in {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
