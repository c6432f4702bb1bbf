"""A tiny llama with its own tokenizer, saved as a transformers directory, and data for it."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaForCausalLM, PreTrainedTokenizerFast

from surgery.train.data import make_examples, read_rows
from surgery.train.data_context import Setting
from surgery.train.tokenizers import find_tokenizer
from tests.shared import tiny

WORDS = [
    *("<pad>", "<s>", "</s>", "<unk>", "user", "assistant", ":", "the", "cat", "dog", "sees", "a", "red"),
    *("green", "tree", "and", "says", "yes", "no", "what", "is", "it"),
]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny.llama()).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    """An encoder of two layers of 32 features, with dropout."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(bert_config()).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def bert_config(**more):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BertConfig(**{"vocab_size": 101, "max_position_embeddings": 64, **sizes, **more})


def save_tokenizer(folder):
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    read = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    read.chat_template = TEMPLATE
    read.save_pretrained(folder)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(program, objective, path, longest=32):
    """Examples and setting that an objective derives from a file of rows."""
    rows = read_rows([path]).train
    setting = objective.prepared(rows, Setting.of(program, find_tokenizer(program), longest))
    return make_examples(rows, objective, setting), setting


@pytest.fixture
def texts(tmp_path):
    """Sentences in which an animal always occurs with the same colour."""
    animals, colours = ("cat", "dog"), ("red", "green")
    rows = [
        {"text": f"the {animals[i % 2]} sees a {colours[i % 2]} tree" + " and says yes" * (i % 3)}
        for i in range(48)
    ]
    return write(tmp_path / "texts.jsonl", rows)
