"""What nothing that trains reaches is run once for a batch: the rest gives what the whole program gives."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from torch_surgery_rl import PPO, TRPO, Experience, LanguagePolicy, compare, roll_out

import surgery
from surgery.api.training import FrozenPart, reference_of

PROMPTS = [[5, 6, 7, 8], [9], [10, 11], [12, 13, 14]] * 4
VALUE = surgery.Head(mode="add", labels=1, head_name="value", pool="none")
UPPER = {"llama": r"re:model\.layers\.3\..*", "gpt2": r"re:transformer\.h\.3\..*"}


@pytest.fixture(scope="module", params=list(UPPER))
def base(request, tmp_path_factory):
    """Four layers whose logits spread enough to prefer something."""
    small = {
        "vocab_size": 24,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    if request.param == "llama":
        config = transformers.LlamaConfig(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
            tie_word_embeddings=False, **small,
        )  # fmt: skip
        made = transformers.LlamaForCausalLM(config)
    else:
        made = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=4, n_head=4, **small))
    folder = tmp_path_factory.mktemp(request.param)
    made.save_pretrained(folder)
    return surgery.load(f"hf:{folder}")


@pytest.fixture(scope="module")
def program(base, request):
    """An adapter on the last layer and on nothing else, and a head for values."""
    return adapted(base, UPPER[base.base.loaded.metadata["model_type"]])


def adapted(base, target):
    torch.manual_seed(1)
    program = base.apply(surgery.Lora(target=target, rank=4, alpha=8), VALUE)
    with torch.no_grad():
        for name, tensor in program.tensors.items():
            if name.endswith("lora.B"):
                tensor.normal_(std=0.1)
    return program


@pytest.fixture(scope="module")
def rollout(program):
    heads = [entry.id for entry in program.journal if entry.pass_name == "head"]
    torch.manual_seed(0)
    return roll_out(program.without(*heads).live(), PROMPTS, 6)


def policies(program, rollout, rows=5):
    """The policy and its reference, whole and from the frozen part on; and what each is called with."""
    reference = reference_of(program)
    frozen = FrozenPart.of(program, [reference], narrow="logits")
    kept = frozen.run({name: rollout.inputs[name] for name in ("input_ids", "attention_mask")}, rows)
    whole = [LanguagePolicy(module) for module in (program.module(), reference.module())]
    return whole, [LanguagePolicy(tail) for tail in frozen.tails], {**rollout.inputs, **kept}, frozen


def products(module):
    return sum("linear" in str(n.target) or "addmm" in str(n.target) for n in module.graph.nodes)


def test_the_rest_gives_what_the_program_gives_with_its_gradients(program, rollout):
    whole, tails, inputs, _ = policies(program, rollout)
    for policy, tail in zip(whole, tails, strict=True):
        (logits, values), (expected, wanted) = tail(**inputs), policy(**rollout.inputs)
        # float32 of other numbers of rows at a time, and a head for some of the tokens
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
        assert (values is None) == (wanted is None)
        if values is not None:
            torch.testing.assert_close(values, wanted, atol=2e-5, rtol=0)
    trained = [p for p in program.module().parameters() if p.requires_grad]
    assert {id(p) for p in tails[0].parameters() if p.requires_grad} == set(map(id, trained))
    pairs = []
    for policy, given in ((whole[0], rollout.inputs), (tails[0], inputs)):
        logits, values = policy(**given)
        weight = torch.linspace(-1, 1, logits.numel()).view_as(logits)
        pairs.append(
            torch.autograd.grad((logits.softmax(-1) * weight).sum() + values.square().sum(), trained)
        )
    for expected, found in zip(*pairs, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


def test_most_of_the_products_are_below(program, rollout):
    _, _, _, frozen = policies(program, rollout)
    whole = products(program.module().graph_module(False))
    below, above = products(frozen.trunk), products(frozen.tails[0].graph_module)
    base = products(reference_of(program).module().graph_module(False))
    assert below >= 0.7 * base  # three layers of four
    assert below + above == whole
    assert frozen.narrowed == "logits"


def test_the_head_is_for_responses_alone(program, rollout):
    _, _, inputs, frozen = policies(program, rollout)
    logits = frozen.tails[0](**inputs)["logits"]
    assert logits.shape == (*rollout.actions.shape, 24)


@pytest.mark.parametrize("method", ["ppo", "trpo"])
def test_an_update_is_the_same(program, rollout, method):
    ends = []
    start = {name: t.detach().clone() for name, t in program.tensors.items()}
    for number in (0, 1):
        whole, tails, inputs, _ = policies(program, rollout)
        chosen = (whole, rollout.inputs) if number == 0 else (tails, inputs)
        (policy, reference), given = chosen
        seen = compare(policy, reference, given, rollout.actions, rollout.mask, rows=4)
        rewards = torch.where(rollout.actions == 7, 1.0, 0.0) * rollout.mask
        experience = Experience.of(
            given, rollout.actions, rollout.mask, rewards, seen["log_probs"], seen["values"]
        )
        if method == "ppo":
            optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.05)
            PPO(epochs=2, minibatch=4).update(
                policy, experience, optimizer, generator=torch.Generator().manual_seed(0)
            )
        else:
            done = TRPO(max_kl=0.01, minibatch=8).update(policy, experience)
            assert 0 < done["kl"] <= 0.01
        ends.append({name: program.tensors[name].detach().clone() for name in start})
        with torch.no_grad():
            for name, tensor in start.items():
                program.tensors[name].copy_(tensor)
    moved = {name: (ends[0][name] - start[name]).norm() for name in start}
    assert max(moved.values()) > 1e-3
    for name in start:
        # float32; TRPO's direction comes of ten products with a Fisher matrix, each of which rounds
        allowed = {"ppo": 1e-3, "trpo": 1e-2}[method] * max(moved.values())
        assert (ends[1][name] - ends[0][name]).norm() <= allowed, name


def test_where_nothing_is_frozen_there_is_no_such_part(base):
    assert FrozenPart.of(base.apply(surgery.Full())) is None
    all_layers = adapted(base, "attn.*,mlp.*")
    frozen = FrozenPart.of(all_layers, [reference_of(all_layers)], narrow="logits")
    assert frozen is None or products(frozen.trunk) <= 3  # of the first layer's own weights alone


def test_another_program_that_differs_below_has_no_part_in_it(base, program):
    other = base.apply(surgery.Quantize(target="attn.*", format="int8"), freeze_base=False)
    assert FrozenPart.of(program, [other]) is None


def test_an_output_that_is_more_than_one_product_is_not_narrowed(program, rollout):
    more = program.apply(surgery.Lora(target="path:lm_head", rank=2, label="out"))
    frozen = FrozenPart.of(more, narrow="logits")
    assert frozen.narrowed == ""
    kept = frozen.run({name: rollout.inputs[name] for name in ("input_ids", "attention_mask")}, 7)
    logits, _ = LanguagePolicy(frozen.tails[0])(**rollout.inputs, **kept)
    expected, _ = LanguagePolicy(more.module())(**rollout.inputs)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)


def test_a_live_model_takes_nothing_from_its_program(program, rollout):
    """The live model that the rollout ran lacks the head; the program itself has it, and adapts it."""
    later = program.apply(surgery.Lora(target="path:head_value", rank=1, label="values"))
    assert later.journal.entries[-1].id == "lora:values"


def test_where_values_alone_train_the_head_is_for_responses_too(base, rollout):
    program = base.apply(VALUE, freeze_base=True)
    reference = reference_of(program)
    frozen = FrozenPart.of(program, [reference], narrow="logits")
    kept = frozen.run({name: rollout.inputs[name] for name in ("input_ids", "attention_mask")}, 4)
    for tail, whole in zip(frozen.tails, (program, reference), strict=True):
        logits, values = LanguagePolicy(tail)(**rollout.inputs, **kept)
        expected, wanted = LanguagePolicy(whole.module())(**rollout.inputs)
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
        assert (values is None) == (wanted is None)
