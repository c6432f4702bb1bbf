"""Prompts: PEFT's logits with PEFT's tokens, attention of real positions, every initialization, every refusal."""

from __future__ import annotations

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import surgery
from surgery.common.errors import PassError
from surgery.passes.prompt.prompt import Prompt
from surgery.testing import check_pass
from tests.conftest import minilm_path
from tests.shared.models import attention, convnet
from tests.techniques.models import program

P = 5
TOLERANCE = 1e-5  # fp32: the same ops on the same values, masks built in another way
CHEAP = ["numerics", "untouched", "inserted", "effect", "second", "weights", "undo"]


def ids(high, shape=(3, 11), low=3):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(3))


def padded(inputs):
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, -3:] = 0
    return {**inputs, "attention_mask": mask}


def prompted(base, rows):
    adapted = base.apply(Prompt(tokens=P))
    (name,) = adapted.tensors
    with torch.no_grad():
        adapted.tensors[name].copy_(rows)
    return adapted


def peft_model(model, task):
    adapted = get_peft_model(model, PromptTuningConfig(task_type=task, num_virtual_tokens=P)).eval()
    torch.manual_seed(7)
    embedding = adapted.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        embedding.normal_(std=0.5)
    return adapted, embedding.detach()[:P]


def agree(got, expected):
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) <= TOLERANCE * max(1.0, float(expected.abs().max()))


def test_peft_on_a_classifier():
    kwargs = {"num_labels": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(minilm_path(), **kwargs)
    head = {
        name: value.clone() for name, value in model.state_dict().items() if name.startswith("classifier")
    }
    theirs, rows = peft_model(model, "SEQ_CLS")
    base = surgery.load(f"hf:{minilm_path()}", task="text-classification", model_kwargs=kwargs)
    with torch.no_grad():
        for name, value in head.items():
            base.base.tensors[name].copy_(value)
    ours = prompted(base, rows)
    inputs = padded({"input_ids": ids(30000)})
    types = torch.zeros_like(inputs["input_ids"])
    with torch.no_grad():
        expected = theirs(**inputs, token_type_ids=types).logits
    agree(ours.run(**inputs, token_type_ids=types)["logits"], expected)


TINY = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=99, max_position_embeddings=64)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_peft_on_a_decoder(name, tmp_path):
    """Logits of real positions only: PEFT's without those of the prompt."""
    torch.manual_seed(0)
    model = TINY[name]()
    model.save_pretrained(tmp_path)
    theirs, rows = peft_model(model, "CAUSAL_LM")
    ours = prompted(surgery.load(f"hf:{tmp_path}"), rows)
    inputs = padded({"input_ids": ids(99)})
    with torch.no_grad():
        expected = theirs(**inputs).logits[:, P:]
    agree(ours.run(**inputs)["logits"], expected)


def test_peft_on_an_encoder_decoder(tmp_path):
    torch.manual_seed(0)
    config = T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    theirs, rows = peft_model(model, "SEQ_2_SEQ_LM")
    ours = prompted(surgery.load(f"hf:{tmp_path}"), rows)
    inputs = padded({"input_ids": ids(99)})
    decoder = ids(99, (3, 7))
    with torch.no_grad():
        expected = theirs(**inputs, decoder_input_ids=decoder)
    got = ours.run(**inputs, decoder_input_ids=decoder)
    agree(got["logits"], expected.logits)
    agree(got["encoder_last_hidden_state"], expected.encoder_last_hidden_state[:, P:])


def test_a_prompt_of_real_tokens_is_those_tokens(tmp_path):
    """The embeddings of given ids as a prompt: what the model says of the rest is as if they had been typed."""
    torch.manual_seed(0)
    TINY["llama"]().save_pretrained(tmp_path)
    base = surgery.load(f"hf:{tmp_path}")
    typed = ids(99, (1, P))
    ours = prompted(base, base.state()["model.embed_tokens.weight"][typed[0]])
    rest = {"input_ids": ids(99), "attention_mask": torch.ones(3, 11, dtype=torch.int64)}
    whole = torch.cat([typed.expand(3, P), rest["input_ids"]], 1)
    expected = base.run(input_ids=whole, attention_mask=torch.ones_like(whole))["logits"][:, P:]
    agree(ours.run(**rest)["logits"], expected)


def test_two_prompts_stand_one_behind_the_other(tmp_path):
    torch.manual_seed(0)
    TINY["llama"]().save_pretrained(tmp_path)
    base = surgery.load(f"hf:{tmp_path}")
    table, typed = base.state()["model.embed_tokens.weight"], ids(99, (1, 7))
    both = base.apply(Prompt(tokens=4, label="one"), Prompt(tokens=3, label="two"))
    with torch.no_grad():
        both.tensors["model.embed_tokens.prompt_one.tokens"].copy_(table[typed[0, :4]])
        both.tensors["model.embed_tokens.prompt_two.tokens"].copy_(table[typed[0, 4:]])
    rest = {"input_ids": ids(99), "attention_mask": torch.ones(3, 11, dtype=torch.int64)}
    whole = torch.cat([typed.expand(3, 7), rest["input_ids"]], 1)
    agree(
        both.run(**rest)["logits"],
        base.run(input_ids=whole, attention_mask=torch.ones_like(whole))["logits"][:, 7:],
    )
    alone = torch.cat([typed[:, 4:].expand(3, 3), rest["input_ids"]], 1)
    agree(
        both.without("one").run(**rest)["logits"],
        base.run(input_ids=alone, attention_mask=torch.ones_like(alone))["logits"][:, 3:],
    )


def test_starts():
    base = surgery.load(f"hf:{minilm_path()}", model_kwargs={"num_hidden_layers": 1})
    table = base.state()["embeddings.word_embeddings.weight"]
    by_text = base.apply(Prompt(tokens=6, init="text", text="a good film"))
    found = by_text.journal.entries[-1].sites[0].decided["ids"]
    assert len(found) == 6
    assert found[:3] == found[3:]
    (rows,) = by_text.tensors.values()
    assert torch.equal(rows, table[found])
    (drawn,) = base.apply(Prompt(tokens=6, init="vocabulary")).tensors.values()
    assert all(bool((table == row).all(1).any()) for row in drawn)
    (normal,) = base.apply(Prompt(tokens=200)).tensors.values()
    assert float(normal.detach().std()) == pytest.approx(float(table.std()), rel=0.05)


def test_a_prompt_of_a_stream_starts_small():
    torch.manual_seed(0)
    (tokens,) = program("vit").apply(Prompt(tokens=200)).tensors.values()
    assert float(tokens.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_positions_are_left_for_the_prompt():
    base = surgery.load(f"hf:{minilm_path()}", model_kwargs={"num_hidden_layers": 1})
    adapted = base.apply(Prompt(tokens=100))
    assert adapted.captured.dynamic_shapes["input_ids"][1].max == 412
    assert base.captured.dynamic_shapes["input_ids"][1].max == 512
    with pytest.raises(PassError, match=r"prompt at .*word_embeddings: 510 tokens leave 2 of 512 positions"):
        base.apply(Prompt(tokens=510))


def test_learns(tmp_path):
    """The prompt learns to make the model answer every text with one token that is unlikely for the base."""
    torch.manual_seed(0)
    model = TINY["llama"]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(
                4 if parameter.dim() > 1 else 1
            )  # as transformers starts them, inputs hardly matter
    model.save_pretrained(tmp_path)
    adapted = surgery.load(f"hf:{tmp_path}").apply(Prompt(tokens=P))
    module = adapted.module().train()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    inputs = {"input_ids": ids(99), "attention_mask": torch.ones(3, 11, dtype=torch.int64)}
    optimizer = torch.optim.Adam(adapted.parameter_groups(0.5))
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(module(**inputs)["logits"][:, -1], torch.full((3,), 7))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.85 * losses[0], losses
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]) == (not name.endswith("prompt.tokens")), name


def test_conformance():
    report = check_pass(Prompt(tokens=3), program("vit"))
    assert set(report.skipped) <= {"tied", "merge", "restored"}


def test_sizes_that_grow_within_a_module_stay_in_it():
    """wav2vec2 computes how many frames there are in its encoder; what stands beside that has to be there too."""
    report = check_pass(Prompt(tokens=3), program("wav2vec2"), checks=["numerics", "unflatten"])
    assert report.ok, report


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minilm", "smollm2", "t5", "mixtral", "wav2vec2"])
def test_conformance_of_the_others(name):
    report = check_pass(Prompt(tokens=3), program(name))
    assert set(report.skipped) <= {"tied", "merge", "restored"}


def test_refusals():
    with pytest.raises(PassError, match="no row of repeated blocks over a sequence; use lora or adapter"):
        surgery.capture(*convnet()).apply(Prompt())
    with pytest.raises(PassError, match="no row of repeated blocks"):
        surgery.capture(*attention()).apply(Prompt())
    with pytest.raises(PassError, match=r"its stream is .*×64×56×56, not a sequence of vectors; use adapter"):
        program("resnet18").apply(Prompt())
    with pytest.raises(PassError, match="reads no token ids, so --init vocabulary"):
        program("vit").apply(Prompt(init="vocabulary"))
    with pytest.raises(PassError, match="give --init text and --text TEXT together"):
        program("t5").apply(Prompt(init="text"))
    with pytest.raises(PassError, match=r"--text needs the model's tokenizer|cannot read --text"):
        program("t5").apply(Prompt(init="text", text="hello"))
