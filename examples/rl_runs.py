"""Train SmolLM2 on preferences and rewards with `surgery train`, on real data.

python examples/rl_runs.py                       all runs
python examples/rl_runs.py ppo --quick           one run with little data, as a test

preferences   dialogues with a preferred answer: a reward model, DPO, and PPO with that reward model
ppo, trpo     a policy learns to continue frequent openings of film sentences so that the demo's classifier rates
              them positive; three seeds each, on held-out openings (needs out/film/adapted of `make demo`)
"""

from __future__ import annotations

import json
import random
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data import dpo_en, sentiment
from runs import Runs, main, smollm2, words

FILM = Path("out/film/adapted")
VALUE = words("--pass head --mode add --labels 1 --head-name value --pool none --init zero")
# With 240 pairs only a small model can be fitted: the first nine layers, and a linear head on their mean.
REWARD = words(
    "--task feature-extraction --model-kwarg num_hidden_layers=9 "
    "--pass head --mode add --labels 1 --head-name reward --pool mean"
)
# Layers below the first adapter get no gradient and run once for each batch, so adapting the last layers saves time.
LAST_EIGHT = words(r"--pass lora --target 're:model\.layers\.2[2-9]\..*' --rank 8")
LAST_TWO = words(r"--pass lora --target 're:model\.layers\.2[89]\..*' --rank 8")
SEEDS = (0, 1, 2)
MAX_KL = 0.1  # Per token, in one step of TRPO.
OPENING = 3  # Words.


def smollm2_with_values(runs: Runs) -> Path:
    reference, *kind = smollm2(runs.out)
    return runs.apply(reference, "policy", *kind, *VALUE, *LAST_TWO)


def preferences(runs: Runs) -> None:
    rows = dpo_en()
    every, learn = runs.write("preferences", rows[:240]), runs.write("pairs-train", rows[:160])
    held = runs.write("pairs-held-out", rows[240:])
    reference, *kind = smollm2(runs.out)
    shown = ["accuracy", "margin", "loss"]
    judge = runs.apply(reference, "judge", *REWARD)
    told = ("--data", every, "--held-out", held, *words("--max-prompt 64 --max-length 192 --batch 8"))
    runs.train(judge, "reward", "--objective", "reward", *told, *words("--epochs 2 --lr 5e-2"), show=shown)
    pairs = ("--data", learn, "--held-out", held, "--max-length", "160", "--batch", "4")
    plain = runs.apply(reference, "answers", *kind, *LAST_EIGHT)
    runs.train(plain, "dpo", "--objective", "dpo", *pairs, "--epochs", "1", "--lr", "1e-3", show=shown)
    policy = smollm2_with_values(runs)
    asked = ("--data", runs.write("asked", short(rows[:240])))
    others = ("--held-out", runs.write("asked-held-out", short(rows[240:]) * 4))
    given = (*asked, *others, *words("--max-length 96 --batch 32 --new-tokens 24"))
    goal = ("--reward", runs.out / "reward", "--kl", "0.05", "--kl-target", "4")
    runs.train(
        policy, "rlhf", "--objective", "ppo", *given, *goal, *words("--steps 6 --evaluate 6 --lr 5e-3"),
        *words("--decay constant --warmup 0 --inner-epochs 3 --minibatch 16"), show=["reward", "kl"],
    )  # fmt: skip


def short(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Short prompts of the rows: then the response is a large part of the reward model's input."""
    return [{"prompt": row["prompt"]} for row in rows if sum(len(m["content"]) for m in row["prompt"]) <= 150]


def openings() -> list[str]:
    """Openings that at least four film sentences share; they say little about the opinion of the film."""
    split = sentiment("film")
    first = Counter(" ".join(s.text.split()[:OPENING]) for s in (*split.train, *split.held_out))
    found = sorted(opening for opening, times in first.items() if times >= 4)
    random.Random(0).shuffle(found)
    return found


def against_the_classifier(runs: Runs, method: str, own: list[str]) -> None:
    if not FILM.is_dir():
        raise SystemExit(f"{FILM}, the classifier of the demo, is missing: run `make demo` first")
    begun = openings()
    learn, held = (
        runs.write(name, [{"prompt": opening} for opening in chosen])
        for name, chosen in (("openings", begun[:60] * 9), ("openings-held-out", begun[60:] * 3))
    )
    policy = smollm2_with_values(runs)
    given = ("--data", learn, "--held-out", held, "--plain", "--reward", FILM, "--reward-class", "1")
    length = words(
        "--new-tokens 6 --max-length 24 --batch 64 --steps 6 --evaluate 6 --decay constant --warmup 0"
    )
    ends = []
    for seed in SEEDS:
        name = f"{method} {seed}"
        line = ("--objective", method, *given, *length, *own, "--kl", "0.02", "--seed", seed)
        ends.append(runs.train(policy, name, *line, show=["reward", "kl"]))
        steps = updates(runs.out / f"{name}.run" / "log.jsonl")
        runs.say(f"KL of a token by update: {' '.join(f'{kl:.4f}' for kl in steps)}")
        if method == "trpo" and max(steps) > MAX_KL:
            raise SystemExit(f"the KL of an update exceeds its bound: {max(steps)} > {MAX_KL}")
    gains = [after["reward"] - before["reward"] for before, after in ends]
    runs.say(
        f"{method}: reward higher by {statistics.mean(gains):.3f} (standard deviation of the seeds "
        f"{statistics.stdev(gains):.3f}), KL of a response at most {max(after['kl'] for _, after in ends):.2f}"
    )


def ppo(runs: Runs) -> None:
    against_the_classifier(runs, "ppo", words("--lr 5e-3 --kl-target 3 --inner-epochs 3 --minibatch 32"))


def trpo(runs: Runs) -> None:
    own = words(
        f"--lr 3e-3 --max-kl {MAX_KL} --damping 0.01 --iterations 6 --fisher-rows 16 --value-epochs 2 --minibatch 64"
    )
    against_the_classifier(runs, "trpo", own)


def updates(log: Path) -> list[float]:
    """KL per token of each update, from the log of a run."""
    figures = [json.loads(line).get("figures", {}) for line in log.read_text().splitlines()]
    return [each["update_kl"] for each in figures if "update_kl" in each]


RUNS: dict[str, Callable[[Runs], Any]] = {"preferences": preferences, "ppo": ppo, "trpo": trpo}


if __name__ == "__main__":
    main(RUNS, __doc__)
