"""Generated text: equal tokens of a program, a transformers directory and ONNX files, sampling, dialogues."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery
from surgery.cli.inference.generate import Generator, Sampling
from surgery.cli.inference.runner import open_runner
from tests.cli.inference.conftest import refused, run
from tests.train.conftest import TEMPLATE, save_tokenizer

PROMPT = "the cat sees"


@pytest.fixture(scope="module")
def models(llama_folder, tmp_path_factory, request):
    """A llama with a random LoRA: saved, merged, and exported as two graphs with a cache and as one graph without."""
    folder = tmp_path_factory.mktemp("generate")
    torch.manual_seed(3)
    program = surgery.load(f"hf:{llama_folder}").apply(
        surgery.Lora(target="attn.*", label="film"), surgery.Lora(target="mlp.*", label="tweets")
    )
    with torch.no_grad():
        for tensor in program.tensors.values():
            tensor.normal_(std=0.3)
    program.save(folder / "program")
    merged = program.merge()
    surgery.store.hf.write_hf(merged, folder / "hf")
    program.export_generation(folder / "onnx", adapters_as_inputs=True)
    (folder / "one").mkdir()
    merged.export(folder / "one" / "model.onnx")
    save_tokenizer(folder / "one")
    return folder


@pytest.fixture(scope="module")
def greedy(models):
    """Tokens and text of transformers."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(models / "hf").eval(),
        AutoTokenizer.from_pretrained(models / "hf"),
    )
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    tokens = found[0, ids.shape[1] :].tolist()
    return tokens, tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("form", ["program", "hf", "one", "one/model.onnx"])
def test_greedy_tokens_are_those_of_transformers(models, greedy, form):
    tokens, text = greedy
    assert len(set(tokens)) > 1
    found = json.loads(run("generate", models / form, PROMPT, "--max-new-tokens", 12, "--json"))
    assert found["tokens"] == tokens
    assert found["text"].strip() == text.strip()


def test_onnx_with_adapters(models, greedy):
    """Both adapters together, and one alone: the exported graphs take them as inputs."""
    args = (PROMPT, "--max-new-tokens", 12, "--json")
    both = json.loads(run("generate", models / "onnx", *args, "--adapter", "film", "--adapter", "tweets"))
    assert both["tokens"] == greedy[0]
    alone = [
        json.loads(run("generate", models / form, *args, "--adapter", "film"))["tokens"]
        for form in ("onnx", "program")
    ]
    assert alone[0] == alone[1] != greedy[0]
    assert "has no adapter 'flim'; did you mean 'film'" in refused(
        "generate", models / "onnx", PROMPT, "--adapter", "flim"
    )
    # Held-out figures of the same directory, from its prompt graph.
    found = [
        json.loads(run("evaluate", models / form, "--data", texts_of(models), "--json", *adapters))["metrics"]
        for form, adapters in (("hf", ()), ("onnx", ("--adapter", "film", "--adapter", "tweets")))
    ]
    # fp32 in onnxruntime, with the adapters beside the weights instead of in them.
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def texts_of(folder):
    path = folder / "texts.jsonl"
    path.write_text('{"text": "the cat sees a red tree"}\n{"text": "the dog says yes and no"}\n')
    return path


def test_sampling_follows_the_seed(models):
    def tokens(form, seed, *more):
        args = ("--max-new-tokens", 16, "--seed", seed, "--json", *more)
        return json.loads(run("generate", models / form, PROMPT, *args))["tokens"]

    first = tokens("hf", 1, "--temperature", "1.5")
    assert tokens("hf", 1, "--temperature", "1.5") == first != tokens("hf", 2, "--temperature", "1.5")
    # The graph without a cache draws from the same probabilities with the same numbers.
    assert tokens("one", 1, "--temperature", "1.5") == first
    nucleus = tokens("hf", 1, "--top-p", "0.5")
    assert tokens("one", 1, "--top-p", "0.5") == nucleus


def test_the_text_comes_in_pieces(models, greedy):
    runner = open_runner(str(models / "one"), surgery.load, surgery.load)
    pieces: list[str] = []
    Generator(runner).generate([7, 8, 10], Sampling(12), pieces.append)
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces).strip() == greedy[1].strip()
    assert (
        run("generate", models / "hf", "-", "--max-new-tokens", 12, stdin=PROMPT).strip() == greedy[1].strip()
    )


def test_a_dialogue(models):
    """Each answer is that to the whole dialogue before it, by the tokenizer's template."""
    printed = run(
        "generate", models / "hf", "--chat", "--max-new-tokens", 6, stdin="what is it\n\nthe dog says\n"
    )
    answers = printed.split("\n")
    assert len(answers) == 3
    assert answers[2] == ""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(models / "hf").eval(),
        AutoTokenizer.from_pretrained(models / "hf"),
    )
    assert tokenizer.chat_template == TEMPLATE
    messages = []
    for said, answer in zip(("what is it", "the dog says"), answers, strict=False):
        messages.append({"role": "user", "content": said})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
        expected = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert answer.strip() == expected
        messages.append({"role": "assistant", "content": expected})


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("hf",), "give a PROMPT"),
        (("hf", PROMPT, "--system", "x"), "add --chat"),
        (("hf", ""), "the prompt has no token"),
        (("bert", PROMPT), "generates no text"),
        (("nothing", PROMPT), "nothing does not exist"),
        (("plain", "--chat"), "has no chat template"),
        (("alone.onnx", PROMPT), "no tokenizer was found"),
    ],
)
def test_wrong_input_is_one_line(models, bert_folder, tmp_path, monkeypatch, args, said):
    shutil.copytree(models / "hf", tmp_path / "hf")
    shutil.copytree(bert_folder, tmp_path / "bert")
    shutil.copytree(models / "hf", tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    shutil.copy(models / "one" / "model.onnx", tmp_path / "alone.onnx")
    monkeypatch.chdir(tmp_path)
    assert said in refused("generate", *args)
