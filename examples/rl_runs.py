"""Teach SmolLM2 by preferences and rewards, by `surgery train`, on real data.

python examples/rl_runs.py                       all of them
python examples/rl_runs.py sentiment --quick     one, with little data, to see that it works

preferences   dialogues of which people preferred one answer: a reward model, DPO, and PPO by that reward model
sentiment     a policy learns to go on with film sentences so that the demo's classifier finds them positive: PPO and
              TRPO, three seeds each (needs out/film/adapted, which `make demo` makes)
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data import dpo_en, sentiment
from runs import Runs, main, smollm2, words

FILM = Path("out/film/adapted")
VALUE = words("--pass head --mode add --labels 1 --head-name value --pool none --init zero")
REWARD = words("--pass head --mode add --labels 1 --head-name reward --pool last --init zero")
# The last six layers: an update, and above all a product with the Fisher matrix, costs a third of that of all thirty.
UPPER = words(r"--pass lora --target 're:model\.layers\.2[4-9]\..*' --rank 8")
LONGEST = 800  # characters of a prompt
SEEDS = (0, 1, 2)
MAX_KL = 0.01  # of a token, in one step of TRPO


def preferences(runs: Runs) -> None:
    # What a long prompt leaves of its answers says little about them.
    rows = [row for row in dpo_en() if sum(len(m["content"]) for m in row["prompt"]) <= LONGEST]
    learn, held = runs.write("pairs-train", rows[:-40]), runs.write("pairs-held-out", rows[-40:])
    reference, *kind = smollm2()
    pairs = ("--data", learn, "--held-out", held, "--max-length", "256", "--batch", "4")
    judge = runs.apply(reference, "judge", *kind, *REWARD, *UPPER)
    shown = ["accuracy", "margin", "loss"]
    runs.train(judge, "reward", "--objective", "reward", *pairs, "--epochs", "1", "--lr", "5e-4", show=shown)
    plain = runs.apply(reference, "dpo start", *kind, *UPPER)
    runs.train(plain, "dpo", "--objective", "dpo", *pairs, "--epochs", "1", "--lr", "5e-4", show=shown)
    policy = runs.apply(reference, "policy", *kind, *VALUE, *UPPER)
    asked = ("--data", learn, "--held-out", held, *words("--max-length 160 --batch 8 --new-tokens 24"))
    goal = ("--reward", runs.out / "reward", "--kl", "0.05", "--kl-target", "4")
    runs.train(
        policy, "rlhf", "--objective", "ppo", *asked, *goal, "--steps", "10", "--lr", "1e-3",
        "--evaluate", "10", show=["reward", "kl"],
    )  # fmt: skip


def sentiment_runs(runs: Runs) -> None:
    if not FILM.is_dir():
        raise SystemExit(f"the classifier is made by the demo: run `make demo` first ({FILM} is missing)")
    split = sentiment("film")
    learn, held = (
        runs.write(name, [{"prompt": " ".join(s.text.split()[:4])} for s in sentences])
        for name, sentences in (("openings", split.train[:2000]), ("openings-held-out", split.held_out[:48]))
    )
    reference, *kind = smollm2()
    policy = runs.apply(reference, "speaker", *kind, *VALUE, *UPPER)
    given = ("--data", learn, "--held-out", held, "--plain", "--reward", FILM, "--reward-class", "1")
    length = words(
        "--new-tokens 10 --max-length 24 --batch 32 --steps 8 --evaluate 8 --decay constant --warmup 0"
    )
    for method, own in (
        ("ppo", words("--lr 3e-3 --kl 0.05 --kl-target 3 --inner-epochs 3 --minibatch 16")),
        ("trpo", words(f"--lr 3e-3 --max-kl {MAX_KL} --iterations 6 --kl 0.05 --minibatch 32")),
    ):
        ends = []
        for seed in SEEDS:
            name = f"{method} {seed}"
            own_words = ("--objective", method, *given, *length, *own, "--seed", seed)
            ends.append(runs.train(policy, name, *own_words, show=["reward", "kl"]))
            steps = updates(runs.out / f"{name}.run" / "log.jsonl")
            if steps:
                runs.say(f"KL of a token by update: {' '.join(f'{kl:.4f}' for kl in steps)}")
            if method == "trpo" and max(steps, default=0.0) > MAX_KL:
                raise SystemExit(f"an update went over its bound: {max(steps)} > {MAX_KL}")
        rewards, kls = ([end[key] for end in ends] for key in ("reward", "kl"))
        runs.say(
            f"{method}: reward {statistics.mean(rewards):.3f} ± {statistics.stdev(rewards):.3f}, "
            f"KL of a response at most {max(kls):.2f}"
        )


def updates(log: Path) -> list[float]:
    """The KL of each update, for a token, from the log of a run."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [float(line["update_kl"]) for line in lines if "update_kl" in line]


RUNS: dict[str, Callable[[Runs], Any]] = {"preferences": preferences, "sentiment": sentiment_runs}


if __name__ == "__main__":
    main(RUNS, __doc__)
