"""Language models: rollouts, the reference policy in the same storage, a grafted value head, PPO and TRPO."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from torch_surgery_rl import (
    PPO,
    TRPO,
    AdaptiveKL,
    Experience,
    LanguagePolicy,
    Rollout,
    categorical_kl,
    evaluate,
    of_program,
    on_texts,
    on_tokens,
    penalized_rewards,
    roll_out,
    score,
    sequence_kl,
)

import surgery
from surgery.api import SurgeryError
from surgery.api.programs import Program

VOCABULARY, EOS, WANTED = 24, 2, 7
PROMPTS = [[5, 6, 7, 8], [9], [10, 11], [12, 13, 14]] * 6


def saved(directory, kind: str = "llama", **options) -> str:
    """A tiny random model whose logits spread enough to prefer something."""
    torch.manual_seed(0)
    small = {"vocab_size": VOCABULARY, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1}
    small |= {"eos_token_id": EOS, "tie_word_embeddings": False, **options}
    if kind == "llama":
        config = transformers.LlamaConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
            max_position_embeddings=64, **small,
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(config)
    elif kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **small)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **small
        )
        model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(directory)
    return f"hf:{directory}"


VALUE = surgery.Head(mode="add", labels=1, head_name="value", pool="none", init="zero")


def adapted(base: Program) -> Program:
    torch.manual_seed(1)
    return base.apply(surgery.Lora(target="attn.*,mlp.*", rank=4, alpha=8), VALUE)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Program:
    return surgery.load(saved(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Program:
    return surgery.load(saved(tmp_path_factory.mktemp("gpt2"), "gpt2"))


def share(prompts, responses) -> list[float]:
    return [row.count(WANTED) / len(row) for row in responses]


# -- rollouts


@pytest.mark.parametrize("kind", ["base", "gpt2"])
def test_log_probabilities_are_those_that_the_cache_sampled_from(kind, request, monkeypatch):
    """Prompts of four lengths, padded on the left to sample and on the right to score."""
    program = adapted(request.getfixturevalue(kind))
    with torch.no_grad():
        for name, tensor in program.tensors.items():
            if name.endswith("lora.B"):
                tensor.normal_(std=0.1)
    live = program.without("head").live()
    seen = []
    generate = live.generate

    def watched(*args, **kwargs):
        out = generate(*args, **kwargs, output_logits=True, return_dict_in_generate=True)
        assert out.past_key_values is not None
        seen.append(torch.stack(out.logits, 1))
        return out.sequences

    monkeypatch.setattr(live, "generate", watched)
    torch.manual_seed(0)
    rollout = roll_out(live, PROMPTS, 10, temperature=0.7)
    assert rollout.prompts == PROMPTS
    assert rollout.responses == [
        row[keep].tolist() for row, keep in zip(rollout.actions, rollout.mask, strict=True)
    ]
    expected = (seen[0] / 0.7).log_softmax(-1).gather(-1, rollout.actions[..., None])[..., 0]
    for module in (program.module(), live):
        found, values = evaluate(
            LanguagePolicy(module, temperature=0.7), rollout.inputs, rollout.actions, rows=5
        )
        assert (values is None) == (module is live)
        # float32 through another order of attention, padded on the other side
        torch.testing.assert_close(found[rollout.mask], expected[rollout.mask], atol=2e-5, rtol=0)
    ended = rollout.mask.sum(1) < 10
    assert ended.any()
    assert not ended.all()
    for row, response in enumerate(rollout.responses):
        assert (response[-1] == EOS) or not ended[row]
        assert EOS not in response[:-1]


def test_a_models_own_settings_for_generation_are_not_obeyed_and_kept(base):
    """top_k=1 would make every response of a prompt the same, and its log-probabilities wrong."""
    live = base.live()
    greedy = transformers.GenerationConfig(top_k=1, repetition_penalty=3.0, eos_token_id=EOS, pad_token_id=0)
    live.generation_config = greedy
    torch.manual_seed(0)
    rollout = roll_out(live, [[5, 6]] * 16, 4)
    assert len({tuple(row) for row in rollout.responses}) > 8
    assert live.generation_config is greedy


# -- reference and value head


def test_the_reference_is_the_program_without_its_adapter_in_the_same_storage(tmp_path):
    base = surgery.load(saved(tmp_path))
    program = adapted(base)
    policy, reference = program.module(), program.without("lora", "head").module()
    own = {p.untyped_storage().data_ptr() for p in base.base.loaded.module.parameters()}
    assert {p.untyped_storage().data_ptr() for p in reference.parameters()} == own
    held = {p.untyped_storage().data_ptr() for p in policy.parameters() if not p.requires_grad}
    assert held == own
    assert not any(p.requires_grad for p in reference.parameters())

    live = program.without("head").live()
    torch.manual_seed(0)
    rollout = roll_out(live, PROMPTS, 5)
    at_start, _ = evaluate(LanguagePolicy(policy), rollout.inputs, rollout.actions)
    ours, _ = evaluate(LanguagePolicy(reference), rollout.inputs, rollout.actions)
    assert torch.equal(at_start, ours)
    with torch.no_grad():
        for name, tensor in program.tensors.items():
            if name.endswith("lora.B"):
                tensor.normal_(std=0.3)
    moved, _ = evaluate(LanguagePolicy(policy), rollout.inputs, rollout.actions)
    again, _ = evaluate(LanguagePolicy(reference), rollout.inputs, rollout.actions)
    assert float((moved - ours).abs().max()) > 0.1
    assert torch.equal(again, ours)
    with surgery.using(live):  # in place: the live model with nothing in
        in_place, _ = evaluate(LanguagePolicy(live), rollout.inputs, rollout.actions)
    back, _ = evaluate(LanguagePolicy(live), rollout.inputs, rollout.actions)
    # the live model runs transformers' own attention
    torch.testing.assert_close(in_place, ours, atol=1e-5, rtol=0)
    torch.testing.assert_close(back, moved, atol=1e-5, rtol=0)


def collected(policy, reference, rollout: Rollout, scores, coefficient: float) -> tuple[Experience, float]:
    log_probs, values = evaluate(policy, rollout.inputs, rollout.actions)
    before, _ = evaluate(reference, rollout.inputs, rollout.actions)
    rewards = penalized_rewards(scores, log_probs, before, rollout.mask, coefficient)
    experience = Experience.of(rollout.inputs, rollout.actions, rollout.mask, rewards, log_probs, values)
    return experience, sequence_kl(log_probs, before, rollout.mask)


def test_the_value_head_learns_alone(base):
    """Scores that the prompt's length decides are foreseen at every token; the policy does not move."""
    program = adapted(base)
    policy = LanguagePolicy(program.module())
    live = program.without("head").live()
    torch.manual_seed(0)
    rollout = roll_out(live, PROMPTS, 5)
    scores = score(on_tokens(lambda prompts, _: [float(len(p)) for p in prompts]), rollout)
    experience, kl = collected(policy, policy, rollout, scores, 0.1)
    assert kl == 0
    trpo = TRPO()
    found = trpo.value_parameters(policy, experience)
    names = {name for name, p in policy.module.named_parameters() if any(p is f for f in found)}
    assert names == {"head_value.weight", "head_value.bias"}
    optimizer = torch.optim.Adam(found, lr=0.05)
    first = trpo.fit_values(policy, experience, optimizer, epochs=1)
    last = trpo.fit_values(policy, experience, optimizer, epochs=60)
    assert last < 0.3 * first
    moved, values = evaluate(policy, rollout.inputs, rollout.actions)
    assert torch.equal(moved, experience.log_probs)
    assert values is not None
    assert float(values[rollout.mask].std()) > 0.1


# -- learning


@torch.no_grad()
def log_probs(policy, rollout: Rollout) -> torch.Tensor:
    """Of every token of the vocabulary, at each token of the responses."""
    return policy(**rollout.inputs)[0][rollout.mask].log_softmax(-1)


def exact_kl(policy, reference, rollout: Rollout) -> float:
    """The KL of a response, summed over its tokens, with every token that could have come."""
    kl = categorical_kl(log_probs(policy, rollout), log_probs(reference, rollout))
    return float(kl.sum() / len(rollout.actions))


@pytest.mark.parametrize("seed", range(3))
def test_ppo_raises_the_reward_at_bounded_kl(base, seed):
    torch.manual_seed(seed)
    program = base.apply(surgery.Lora(target="attn.*,mlp.*", rank=4, alpha=8), VALUE)
    policy = LanguagePolicy(program.module())
    reference = LanguagePolicy(program.without("lora", "head").module())
    live = program.without("head").live()
    optimizer = torch.optim.Adam(program.parameter_groups(lr=1e-2))
    ppo, beta, reward = PPO(minibatch=24, epochs=3), AdaptiveKL(0.04, target=6.0, gain=0.2), on_tokens(share)
    means, divergences = [], []
    for _ in range(20):
        rollout = roll_out(live, PROMPTS * 4, 8)
        scores = score(reward, rollout)
        experience, kl = collected(policy, reference, rollout, scores, beta.coefficient)
        ppo.update(policy, experience, optimizer)
        beta.update(kl)
        means.append(float(scores.mean()))
        divergences.append(exact_kl(policy, reference, rollout))
    # From 0.02 to 0.3 at KL 7 to 9; the standard error of a mean of 96 responses is 0.02.
    assert means[0] < 0.06
    assert sum(means[-3:]) / 3 > means[0] + 0.15
    assert max(divergences) < 2 * beta.target


def test_trpo_raises_the_reward_and_keeps_to_its_bound(base):
    torch.manual_seed(0)
    program = base.apply(surgery.Lora(target="attn.*,mlp.*", rank=4, alpha=8), VALUE)
    policy = LanguagePolicy(program.module())
    live = program.without("head").live()
    trpo, reward = TRPO(max_kl=0.03, damping=0.01, iterations=5, minibatch=48), on_tokens(share)
    optimizer, means = None, []
    for _ in range(13):
        rollout = roll_out(live, PROMPTS * 4, 8)
        scores = score(reward, rollout)
        experience, _ = collected(policy, policy, rollout, scores, 0.0)
        optimizer = optimizer or torch.optim.Adam(trpo.value_parameters(policy, experience), lr=1e-2)
        before = log_probs(policy, rollout)
        seen = trpo.update(policy, experience)
        after = log_probs(policy, rollout)
        kl = float(categorical_kl(before, after).mean())
        assert kl <= trpo.max_kl + 1e-6  # float32: measured in another order of rows
        assert kl == pytest.approx(seen["kl"], abs=1e-6)
        trpo.fit_values(policy, experience, optimizer)
        means.append(float(scores.mean()))
    # From 0.02 to 0.23; the standard error of a mean of 96 responses is 0.02.
    assert sum(means[-3:]) / 3 > means[0] + 0.15


def test_fisher_vector_products_of_a_program_are_those_of_the_explicit_matrix(tmp_path):
    """Over an adapter's parameters, through attention, in float64; the explicit one a gradient for each action."""
    base = surgery.load(saved(tmp_path), model_kwargs={"dtype": "float64"})
    program = base.apply(surgery.Lora(target="attn.q,mlp.up", rank=1), VALUE)
    policy = LanguagePolicy(program.module())
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in program.tensors.items():
            if name.endswith("lora.B"):
                tensor.normal_(std=0.1)
    rollout = roll_out(program.without("head").live(), PROMPTS[:3], 3)
    experience, _ = collected(policy, policy, rollout, torch.zeros(3), 0.0)
    parameters = [p for name, p in policy.named_parameters() if name.endswith((".A", ".B"))]
    assert len(parameters) == 8
    logits, _ = policy(**rollout.inputs)
    assert logits.dtype == torch.float64
    known = logits[rollout.mask].log_softmax(-1)
    fisher = 0
    for log_prob in known.flatten():
        slopes = torch.autograd.grad(log_prob, parameters, retain_graph=True)
        slope = torch.cat([s.flatten() for s in slopes])
        fisher = fisher + log_prob.exp().detach() * torch.outer(slope, slope) / len(known)
    product = TRPO(damping=0.0, minibatch=2).fisher(policy, experience, parameters)
    for vector in torch.randn(3, len(fisher), dtype=torch.float64):
        expected = fisher @ vector
        torch.testing.assert_close(product(vector), expected, atol=1e-5 * float(expected.norm()), rtol=0)


def test_trpo_goes_through_quantized_weights(base):
    """Weights that are made again from codes in a backward pass are so in the second one."""
    program = adapted(base.apply(surgery.Quantize(target="attn.*,mlp.*")))
    policy = LanguagePolicy(program.module())
    torch.manual_seed(0)
    rollout = roll_out(program.without("head").live(), PROMPTS, 6)
    experience, _ = collected(policy, policy, rollout, score(on_tokens(share), rollout), 0.0)
    seen = TRPO(iterations=4).update(policy, experience)
    assert 0 < seen["kl"] <= 0.01
    assert seen["improvement"] > 0


# -- rewards and refusals


class Words:
    """A tokenizer of whole words w0, w1, …"""

    def __call__(self, text, **kwargs):
        if isinstance(text, str):
            return {"input_ids": [int(word[1:]) for word in text.split()]}
        rows = [self(t)["input_ids"] for t in text]
        longest = max(map(len, rows))
        return {
            "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
            "token_type_ids": torch.zeros(len(rows), longest, dtype=torch.long),
        }

    def decode(self, tokens, skip_special_tokens):
        return " ".join(f"w{token}" for token in tokens if token > 2)


def test_rewards_of_texts_and_of_programs(base, tmp_path):
    judge = surgery.load(saved(tmp_path, "bert", num_labels=3))
    torch.manual_seed(0)
    texts = ["w5 w6 w7 w8", "w9", "w10 w11"]
    rollout = roll_out(base.live(), texts, 6, tokenizer=Words())
    assert rollout.prompts == [[5, 6, 7, 8], [9], [10, 11]]
    counted = score(
        on_texts(lambda prompts, responses: [len(r.split()) for r in responses], Words()), rollout
    )
    assert counted.tolist() == [sum(token > 2 for token in row) for row in rollout.responses]

    for reader in (None, Words()):
        found = score(of_program(judge, label=1, tokenizer=Words(), reader=reader, rows=2), rollout)
        for row in range(3):
            tokens = rollout.prompts[row] + rollout.responses[row]
            tokens = [t for t in tokens if t > 2 or reader is None]
            alone = judge.base.loaded.module(torch.tensor([tokens])).logits[0].log_softmax(-1)[1]
            # float32, padded and not
            assert float(found[row]) == pytest.approx(float(alone.detach()), abs=1e-5)
    with pytest.raises(SurgeryError, match=r"output has shape \(3, 3\); it must be rows × 1, or"):
        score(of_program(judge), rollout)
    with pytest.raises(SurgeryError, match="no class 3; choose one from 0 to 2"):
        score(of_program(judge, label=3), rollout)
    with pytest.raises(SurgeryError, match="pass the policy's too"):
        of_program(judge, label=1, reader=Words())


def test_bad_input_is_refused_in_a_line(base):
    live = base.live()
    rollout = roll_out(live, PROMPTS[:3], 2)
    policy = LanguagePolicy(base.module())
    for act, message in (
        (
            lambda: score(on_tokens(lambda p, r: [0.5, float("nan"), 1]), rollout),
            "reward of response 1 is nan",
        ),
        (lambda: score(on_tokens(lambda p, r: [0.5]), rollout), r"shape \(1,\) for 3 responses"),
        (lambda: roll_out(live, [], 4), "no prompts"),
        (lambda: roll_out(live, [[5], []], 4), "prompt 1 is empty"),
        (lambda: roll_out(live, ["a"], 4), "the prompts are texts; pass a tokenizer"),
        (
            lambda: roll_out(live, [[5] * 60], 5),
            "60 tokens plus 5 new ones exceeds the model's 64 positions",
        ),
        (lambda: roll_out(base.module(), [[5]], 4), "is not a causal language model that can generate"),
        (lambda: roll_out(live, [[5]], 0), "responses would be empty"),
        (
            lambda: collected(policy, policy, rollout, torch.zeros(3), 0.1),
            "the policy has no values; add a value head",
        ),
    ):
        with pytest.raises(SurgeryError, match=message) as error:
            act()
        assert "\n" not in str(error.value)
