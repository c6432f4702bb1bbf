"""Teach SmolLM2 by preferences and rewards, by `surgery train`, on real data.

python examples/rl_runs.py                       all of them
python examples/rl_runs.py ppo --quick           one, with little data, to see that it works

preferences   300 dialogues of which people preferred one answer: a reward model, DPO, and PPO by that reward model
ppo, trpo     a policy learns to go on with film sentences so that the demo's classifier finds them positive, three
              seeds each (needs out/film/adapted, which `make demo` makes)
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data import dpo_en, sentiment
from runs import Runs, main, smollm2, words
from training_runs import LORA

FILM = Path("out/film/adapted")
VALUE = words("--pass head --mode add --labels 1 --head-name value --pool none --init zero")
REWARD = words("--pass head --mode add --labels 1 --head-name reward --pool last")
# The last six layers: an update, and above all a product with the Fisher matrix, costs a third of that of all thirty.
UPPER = words(r"--pass lora --target 're:model\.layers\.2[4-9]\..*' --rank 8")
SEEDS = (0, 1, 2)
MAX_KL = 0.01  # of a token, in one step of TRPO


def preferences(runs: Runs) -> None:
    rows = dpo_en()
    learn, held = runs.write("pairs-train", rows[:160]), runs.write("pairs-held-out", rows[240:])
    reference, *kind = smollm2()
    pairs = ("--data", learn, "--held-out", held, "--max-length", "192", "--batch", "4")
    judge = runs.apply(reference, "judge", *kind, *REWARD, *LORA)
    shown = ["accuracy", "margin", "loss"]
    runs.train(judge, "reward", "--objective", "reward", *pairs, "--epochs", "1", "--lr", "5e-4", show=shown)
    plain = runs.apply(reference, "dpo start", *kind, *LORA)
    runs.train(plain, "dpo", "--objective", "dpo", *pairs, "--epochs", "1", "--lr", "5e-4", show=shown)
    policy = runs.apply(reference, "policy", *kind, *VALUE, *UPPER)
    asked = ("--data", learn, "--held-out", held, *words("--max-length 160 --batch 8 --new-tokens 24"))
    goal = ("--reward", runs.out / "reward", "--kl", "0.05", "--kl-target", "4")
    runs.train(
        policy, "rlhf", "--objective", "ppo", *asked, *goal, "--steps", "10", "--lr", "1e-3",
        "--evaluate", "10", show=["reward", "kl"],
    )  # fmt: skip


def against_the_classifier(runs: Runs, method: str, own: list[str]) -> None:
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
    ends = []
    for seed in SEEDS:
        name = f"{method} {seed}"
        line = ("--objective", method, *given, *length, *own, "--lr", "3e-3", "--kl", "0.05", "--seed", seed)
        ends.append(runs.train(policy, name, *line, show=["reward", "kl"]))
        steps = updates(runs.out / f"{name}.run" / "log.jsonl")
        runs.say(f"KL of a token by update: {' '.join(f'{kl:.4f}' for kl in steps)}")
        if method == "trpo" and max(steps) > MAX_KL:
            raise SystemExit(f"an update went over its bound: {max(steps)} > {MAX_KL}")
    rewards, kls = ([end[key] for end in ends] for key in ("reward", "kl"))
    runs.say(
        f"{method}: reward {statistics.mean(rewards):.3f} ± {statistics.stdev(rewards):.3f}, "
        f"KL of a response at most {max(kls):.2f}"
    )


def ppo(runs: Runs) -> None:
    against_the_classifier(runs, "ppo", words("--kl-target 3 --inner-epochs 3 --minibatch 16"))


def trpo(runs: Runs) -> None:
    own = words(f"--max-kl {MAX_KL} --damping 0.003 --iterations 8 --minibatch 32")
    against_the_classifier(runs, "trpo", own)


def updates(log: Path) -> list[float]:
    """The KL of each update, for a token, from the log of a run."""
    figures = [json.loads(line).get("figures", {}) for line in log.read_text().splitlines()]
    return [each["update_kl"] for each in figures if "update_kl" in each]


RUNS: dict[str, Callable[[Runs], Any]] = {"preferences": preferences, "ppo": ppo, "trpo": trpo}


if __name__ == "__main__":
    main(RUNS, __doc__)
