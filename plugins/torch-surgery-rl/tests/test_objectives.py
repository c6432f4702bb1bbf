"""ppo and trpo as objectives: through `surgery train`, resumed, rewarded by functions and by programs."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

from surgery.api.training import find_objective

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch_surgery_rl import PPO, Judge, PpoObjective, TrpoObjective, roll_out

import surgery
from surgery.api.programs import LoadError, TrainingError, make_plugin_manager
from surgery.api.training import Setting, Settings, find_tokenizer, read_rows, split, train

PLUGIN = Path(__file__).parent.parent
WORDS = [
    *("<pad>", "<s>", "</s>", "<unk>", "user", "assistant", ":", "the", "cat", "dog", "sees", "a", "red"),
    *("green", "tree", "and", "says", "yes", "no", "what", "is", "it"),
]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
PROMPTS = ["what is it", "is the dog red", "the cat", "what sees the cat", "a tree", "it is a dog and"]
VALUE = surgery.Head(mode="add", labels=1, head_name="value", pool="none", init="zero")
LORA = surgery.Lora(target="attn.*,mlp.*", rank=4, alpha=8)


def reader(words, template=TEMPLATE):
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special)
    made.chat_template = template
    return made


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny random llama whose logits spread enough to prefer something, and its tokenizer."""
    made = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(made)
    reader(WORDS).save_pretrained(made)
    return made


@pytest.fixture(scope="session")
def base(folder):
    return surgery.load(f"hf:{folder}")


def adapted(base, *passes):
    torch.manual_seed(1)
    return base.apply(*(passes or (LORA, VALUE)))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS * 12))
    return path


@pytest.fixture(autouse=True)
def rewards(monkeypatch):
    """A module with functions that reward."""
    module = types.ModuleType("rewards_of_tests")
    module.calls = []
    module.stop = None

    def red(prompts, responses):
        module.calls.append(len(responses))
        if len(module.calls) == module.stop:
            raise RuntimeError("the power is off")
        return [r.split().count("red") / max(1, len(r.split())) for r in responses]

    module.red, module.number = red, 3
    module.nan = lambda prompts, responses: [float("nan")] * len(responses)
    monkeypatch.setitem(sys.modules, "rewards_of_tests", module)
    return module


RED = "rewards_of_tests:red"
PPO_OPTIONS = {"reward": RED, "new_tokens": 8, "kl": 0.02, "kl_target": 6.0, "minibatch": 18}
TRPO_OPTIONS = {"reward": RED, "new_tokens": 8, "kl": 0.0, "max_kl": 0.03, "damping": 0.01, "iterations": 5}
SETTINGS = {"batch": 36, "lr": 1e-2, "max_length": 48, "decay": "constant", "warmup": 0}


def fit(program, objective, path, run, held_out=0.25, resume=False, **more):
    settings = Settings.parse({**SETTINGS, **more})
    rows = split(read_rows([path]), held_out, settings.seed)
    return train(
        program, objective, rows, settings, folder=run, tokenizer=find_tokenizer(program), resume=resume
    )


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def figures(run):
    return [row["figures"] for row in log(run) if "figures" in row]


# -- learning


@pytest.mark.parametrize(
    ("objective", "steps"),
    [(PpoObjective(**PPO_OPTIONS), 14), (TrpoObjective(**TRPO_OPTIONS, minibatch=36), 18)],
)
def test_the_reward_of_held_out_prompts_rises_at_bounded_kl(objective, steps, base, prompts, tmp_path):
    program = adapted(base)
    result = fit(program, objective, prompts, tmp_path, steps=steps, evaluate=steps)
    assert result.before["kl"] == 0
    # 18 prompts; chance is 0.03, and the standard error of such a mean about 0.04.
    assert result.before["reward"] < 0.1
    assert result.metrics["reward"] > result.before["reward"] + 0.12
    assert 0 < result.metrics["kl"] < 12
    seen = figures(tmp_path)
    assert len(seen) == steps
    shared = {"reward", "kl", "kl_coefficient", "value_error", "length", "update_kl"}
    assert seen[0].keys() == shared | ({"step"} if objective.name == "trpo" else {"clipped", "entropy"})
    assert seen[0]["kl"] == 0
    if objective.name == "trpo":
        assert all(0 <= row["update_kl"] <= 0.03 for row in seen)
        assert sum(row["step"] > 0 for row in seen) > steps / 2
    else:
        assert seen[1]["kl_coefficient"] < 0.02  # far below its target at the start
        assert any(row["clipped"] > 0 for row in seen)


@pytest.mark.parametrize(
    "objective",
    [PpoObjective(**PPO_OPTIONS), pytest.param(TrpoObjective(**TRPO_OPTIONS), marks=pytest.mark.slow)],
)
def test_resumed_it_has_the_same_weights(objective, base, prompts, tmp_path, rewards):
    """Stopped inside a step, with an adapted penalty and moments of the optimizer in the checkpoint."""
    options = {"steps": 6, "checkpoint": 2, "held_out": 0.0, "batch": 12}
    whole = adapted(base)
    fit(whole, objective, prompts, tmp_path / "whole", **options)
    rewards.calls.clear()
    rewards.stop = 5
    with pytest.raises(TrainingError, match="the reward function raised RuntimeError: the power is off"):
        fit(adapted(base), objective, prompts, tmp_path / "parts", **options)
    rewards.stop = None
    again = adapted(base)
    fit(again, objective, prompts, tmp_path / "parts", resume=True, **options)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in whole.tensors.items())
    assert log(tmp_path / "whole") == log(tmp_path / "parts")


def completed(objective, program, path, seed=0):
    rows = read_rows([path]).train
    setting = objective.prepared(rows, Setting.of(program, find_tokenizer(program), 48))
    examples = [example for row in rows for example in objective.examples(row, setting)]
    batch = objective.collate(examples[:24], setting, torch.Generator().manual_seed(seed))
    companions = objective.companions(program)
    return objective.complete(batch, companions), companions


@pytest.mark.parametrize("kind", [PpoObjective, TrpoObjective])
def test_in_a_loop_of_ones_own(kind, base, prompts):
    program = adapted(base)
    objective = kind(reward=RED, new_tokens=8)
    optimizer = torch.optim.Adam(program.parameter_groups(lr=1e-2))
    batch, companions = completed(objective, program, prompts)
    same, _ = completed(objective, program, prompts)
    other, _ = completed(objective, program, prompts, seed=1)
    assert torch.equal(same["rollout"].actions, batch["rollout"].actions)
    assert not torch.equal(other["rollout"].actions, batch["rollout"].actions)
    torch.testing.assert_close(batch["log_probs"], batch["reference"], atol=0, rtol=0)
    first = objective.loss(program.module(), batch).detach()
    for _ in range(3):
        optimizer.zero_grad()
        objective.loss(program.module(), batch).backward()
        optimizer.step()
    assert objective.loss(program.module(), batch) < first
    assert sum(batch["kl"]) == 0
    moved = objective.complete({**batch}, companions)
    assert float(moved["kl"].mean()) > 0
    assert torch.equal(objective.observe(program.module(), moved)["kl"], moved["kl"])


def test_ppo_here_is_that_of_the_library(base, prompts):
    program = adapted(base)
    objective = PpoObjective(reward=RED, new_tokens=8, minibatch=24, ratio_clip=0.3, value_clip=None)
    batch, _ = completed(objective, program, prompts)
    policy, experience = objective.policy(program.module()), objective.experience(batch)
    loss, _ = PPO(clip=0.3, value_clip=None).loss(*policy(**experience.inputs), experience)
    assert torch.equal(objective.loss(program.module(), batch), loss)


def test_live_and_reference_share_the_programs_storage(base, prompts):
    program = adapted(base)
    companions = PpoObjective(reward=RED).companions(program)
    own = {p.untyped_storage().data_ptr() for p in base.base.loaded.module.parameters()}
    inserted = {t.untyped_storage().data_ptr() for t in program.tensors.values()}
    for name, held in (("live", own | inserted), ("reference", own), ("policy", own | inserted)):
        storages = {p.untyped_storage().data_ptr() for p in companions[name].parameters()}
        assert storages <= held, name


# -- what judges


def saved(program, folder):
    program.save(folder)
    return str(folder)


@pytest.mark.parametrize("pool", ["last", "none"])
def test_a_reward_model_on_the_policys_tokens(pool, base, tmp_path):
    torch.manual_seed(5)
    judge = base.apply(LORA, surgery.Head(mode="add", labels=1, head_name="reward", pool=pool))
    rollout = roll_out(base.live(), [[7, 8], [9, 10, 11], [12]], 6)
    found = Judge.of(saved(judge, tmp_path / "judge"))(rollout, reader(WORDS))
    for row in range(3):
        ids = torch.tensor([rollout.prompts[row] + rollout.responses[row]])
        score = judge.run(input_ids=ids, attention_mask=torch.ones_like(ids))["logits_reward"]
        # fp32, padded and not
        assert float(found[row]) == pytest.approx(float(score.flatten()[-1]), abs=1e-5)


def test_from_preferences_to_a_policy(base, prompts, tmp_path):
    """Pairs of which the red one is preferred teach a reward model; by it alone the policy learns to say red."""
    draw = random.Random(0)
    others = [word for word in WORDS[7:] if word != "red"]
    rows = []
    for asked in PROMPTS * 8:
        plain = draw.choices(others, k=8)
        red = [word if draw.random() < 0.6 else "red" for word in plain[:-1]] + ["red"]
        rows.append({"prompt": asked, "chosen": " ".join(red), "rejected": " ".join(plain)})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = adapted(
        base, LORA, surgery.Head(mode="add", labels=1, head_name="reward", pool="mean", init="zero")
    )
    preferences = find_objective(make_plugin_manager(), "reward").cls()
    learned = fit(judge, preferences, path, tmp_path / "judge.run", batch=8, steps=20, evaluate=20)
    assert learned.before["accuracy"] == 0.5  # a head of zeros prefers nothing
    assert learned.metrics["accuracy"] > 0.9  # of 12 pairs held out
    policy = adapted(base)
    objective = PpoObjective(**{**PPO_OPTIONS, "reward": saved(judge, tmp_path / "judge")})
    result = fit(policy, objective, prompts, tmp_path / "policy.run", steps=12, evaluate=12)

    assert result.metrics["reward"] > result.before["reward"] + 0.5
    assert 0 < result.metrics["kl"] < 12  # twice the target

    def count(program):
        rollout = roll_out(program.live(), [find_tokenizer(base)(p)["input_ids"] for p in PROMPTS * 4], 8)
        return sum(response.count(WORDS.index("red")) for response in rollout.responses)

    assert count(policy.undo("head")) > 2 * count(base)


def test_a_classifier_with_a_tokenizer_of_its_own(base, tmp_path):
    torch.manual_seed(2)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=3, initializer_range=0.5,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "bert")
    other = reader(WORDS[:4] + WORDS[:3:-1])
    other.save_pretrained(tmp_path / "bert")
    own = reader(WORDS)
    rollout = roll_out(base.live(), [[7, 8], [9, 10, 11], [12]], 6)
    for reads in ("whole", "response"):
        found = Judge.of(f"hf:{tmp_path / 'bert'}", 2, reads)(rollout, own)
        for row in range(3):
            tokens = (rollout.prompts[row] if reads == "whole" else []) + rollout.responses[row]
            ids = other(own.decode(tokens, skip_special_tokens=True), return_tensors="pt")["input_ids"]
            expected = model(ids).logits[0].log_softmax(-1)[2]
            assert float(found[row]) == pytest.approx(float(expected.detach()), abs=1e-5)
    with pytest.raises(TrainingError, match="needs one output with a single value, but has logits"):
        Judge.of(f"hf:{tmp_path / 'bert'}")


def test_a_judge_that_is_none_is_refused(base, rewards):
    rollout = roll_out(base.live(), [[7, 8]], 3)
    for name, kind, message in (
        ("", TrainingError, "give the directory of a reward program, or MODULE:FUNCTION"),
        ("nowhere/", TrainingError, "give the directory of a reward program"),
        ("no_such_module:red", LoadError, "there is no module 'no_such_module'"),
        ("rewards_of_tests:green", LoadError, "rewards_of_tests has no 'green'"),
        ("rewards_of_tests:number", TrainingError, "is of type int; give a function"),
    ):
        with pytest.raises(kind, match=message):
            Judge.of(name)
    with pytest.raises(TrainingError, match="--reward-class needs a program"):
        Judge.of(RED, 1)
    with pytest.raises(surgery.SurgeryError, match="the reward of response 0 is nan"):
        Judge.of("rewards_of_tests:nan")(rollout, reader(WORDS))


# -- refusals


def test_what_cannot_be_trained_is_refused_in_a_line(base, prompts, tmp_path):
    no_head = adapted(base, LORA)
    pooled = adapted(base, LORA, surgery.Head(mode="add", labels=1, head_name="value", pool="last"))
    all_of_it = adapted(base, VALUE)
    everything = base.apply(LORA, VALUE, freeze_base=False)
    good, ppo = adapted(base), PpoObjective(reward=RED, new_tokens=4)
    for program, objective, more, message in (
        (
            no_head,
            ppo,
            {},
            "no output 'logits_value' with one value per token; add one with --pass head",
        ),
        (pooled, ppo, {}, "instead of one value per token; add the head with pool='none'"),
        (everything, ppo, {}, r"add an adapter \(--pass lora\)"),
        (all_of_it, TrpoObjective(reward=RED), {}, "no trainable parameter reaches the policy's logits"),
        (good, ppo, {"accumulate": 2}, "leave out --accumulate"),
        (good, ppo, {"precision": "bf16"}, "leave out --precision bf16"),
        (good, ppo, {"regularize": ["l1=1e-4@attn.*"]}, "leave out --regularize"),
        (good, PpoObjective(), {}, "give the directory of a reward program"),
        (good, PpoObjective(reward="rewards_of_tests:nan"), {}, "the reward of response 0 is nan"),
        (good, PpoObjective(reward=RED, new_tokens=47), {}, "leaves fewer than 47 of 48 tokens"),
    ):
        with pytest.raises(surgery.SurgeryError, match=message) as error:
            fit(program, objective, prompts, tmp_path / "run", steps=2, held_out=0.0, **more)
        assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_stop_it(base, prompts, tmp_path, rewards):
    program = adapted(base)
    plain = rewards.red

    def breaks(asked, responses):
        if len(rewards.calls) == 3:
            with torch.no_grad():
                program.tensors["head_value.weight"].fill_(float("nan"))
        return plain(asked, responses)

    rewards.breaks = breaks
    objective = PpoObjective(**{**PPO_OPTIONS, "reward": "rewards_of_tests:breaks"})
    with pytest.raises(TrainingError, match="the value of row 0, step 0 is nan at step 4, rows") as error:
        fit(program, objective, prompts, tmp_path, steps=6, checkpoint=2, held_out=0.0)
    assert "the weight head_value.weight is already not finite" in str(error.value)
    assert "the checkpoint of step 2 is in " in str(error.value)


# -- installed


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel as pip unpacks it; what is imported and which entry points there are come from it."""
    made = tmp_path_factory.mktemp("wheel")
    copy = shutil.copytree(
        PLUGIN, made / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    )
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", made / "dist", copy]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    (wheel,) = (made / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(made / "site")
    (made / "site" / "my_reward.py").write_text(
        "def red(prompts, responses):\n    return [r.split().count('red') for r in responses]\n"
    )
    return made / "site"


def start(site, *args):
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", "from surgery.cli import main; main()", *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
    )  # fmt: skip


def ran(process, code=0):
    out, errors = process.communicate(timeout=300)
    assert process.returncode == code, out + errors
    assert "Traceback" not in errors
    return out, errors.strip()


def command(program, data, out, objective, *more):
    options = [
        "--objective",
        objective,
        "--reward",
        "my_reward:red",
        "--new-tokens",
        "6",
        "--data",
        data,
        "-o",
        out,
    ]
    return ["train", program, *options, "--batch", "16", "--lr", "1e-2", "--max-length", "40", *more]


def test_installed_and_from_the_command_line(installed, base, prompts, tmp_path):
    said, _ = ran(start(installed, "objectives", "--json"))
    own = {row["name"] for row in json.loads(said) if row["distribution"] == "torch-surgery-rl"}
    assert own == {"ppo", "trpo"}
    adapted(base).save(tmp_path / "adapted")
    out = tmp_path / "trained"
    said, _ = ran(
        start(installed, *command(tmp_path / "adapted", prompts, out, "trpo", "--steps", "2", "--json"))
    )
    result = json.loads(said)
    assert result["steps"] == 2
    assert result["metrics"].keys() == {"reward", "kl", "length"}
    trained = surgery.load(str(out))
    assert [e.pass_name for e in trained.journal] == ["freeze", "lora", "head"]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ppo", "trpo"])
def test_killed_and_resumed_has_the_same_weights(objective, installed, base, prompts, tmp_path):
    adapted(base).save(tmp_path / "adapted")
    more = ["--steps", "30", "--checkpoint", "5", "--evaluate", "15", "--kl-target", "3"]

    def begin(out, *resume):
        return start(installed, *command(tmp_path / "adapted", prompts, out, objective, *more, *resume))

    ran(begin(tmp_path / "whole"))
    killed, run = begin(tmp_path / "parts"), tmp_path / "parts.run"
    until = time.monotonic() + 240
    while not (run / "log.jsonl").is_file() or len(figures(run)) < 12:
        assert killed.poll() is None, killed.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    ran(begin(tmp_path / "parts", "--resume"))
    first, second = (surgery.load(str(tmp_path / name)) for name in ("whole", "parts"))
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())
    assert log(tmp_path / "whole.run") == log(run)
