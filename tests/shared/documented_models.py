"""Tiny models and data under the names that the examples of passes and objectives use."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.shared import tiny

WORDS = (
    "a the good bad fine dull film story cast end what do you think of it is yes no . ? system user assistant"
)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def tokenizer(folder: Path, chat: bool = False) -> None:
    """Write a tokenizer that splits at spaces."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", *WORDS.split()]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )
    made.chat_template = TEMPLATE if chat else None
    made.save_pretrained(folder)


def language_model(folder: Path, chat: bool = False) -> str:
    """Write a llama of two layers whose table and head are tied."""
    config = tiny.llama()
    config.tie_word_embeddings = True
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer(folder, chat)
    return f"hf:{folder}"


def encoder(folder: Path, cls: type[transformers.PreTrainedModel]) -> str:
    """Write a BERT of two layers, as a class of transformers stores it."""
    config = transformers.BertConfig(
        vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    cls(config).save_pretrained(folder)
    tokenizer(folder)
    return f"hf:{folder}"


def gpt2(folder: Path) -> str:
    transformers.GPT2LMHeadModel(tiny.gpt2()).save_pretrained(folder)
    tokenizer(folder)
    return f"hf:{folder}"


def stand_ins(folder: Path) -> dict[str, str]:
    """Reference in an example -> the reference of a tiny model of the same kind, with options."""
    torch.manual_seed(0)
    return {
        "hf:google-bert/bert-base-uncased": encoder(folder / "bert", transformers.BertForMaskedLM),
        "hf:sentence-transformers/all-MiniLM-L6-v2": encoder(folder / "minilm", transformers.BertModel),
        "hf:HuggingFaceTB/SmolLM2-135M-Instruct": language_model(folder / "chat", chat=True),
        "hf:HuggingFaceTB/SmolLM2-135M": language_model(folder / "llama"),
        "hf:openai-community/gpt2": gpt2(folder / "gpt2"),
        "timm:resnet18": "timm:test_resnet --random",
    }


def write_data(folder: Path) -> None:
    """Write the data files that the examples name."""
    good, bad = "a good film . the cast is fine", "a dull film . the end is bad"
    reviews = [{"text": text, "label": label} for text, label in ((good, "yes"), (bad, "no")) * 6]
    ratings = [{"text": text, "label": score} for text, score in ((good, 4.5), (bad, 1.0)) * 6]
    rows = {
        "reviews.csv": reviews,
        "ratings.csv": ratings,
        "texts.jsonl": [{"text": row["text"]} for row in reviews],
        "pairs.jsonl": [{"anchor": "what is good ?", "positive": good}, {"anchor": "bad", "positive": bad}]
        * 6,
        "answers.jsonl": [{"prompt": "what do you think ?", "response": row["text"]} for row in reviews],
        "preferences.jsonl": [{"prompt": "what do you think ?", "chosen": good, "rejected": bad}] * 12,
        "prompts.jsonl": [{"prompt": "what do you think ?"}, {"prompt": "the film is"}] * 6,
    }
    for name, held in rows.items():
        with (folder / name).open("w", newline="") as file:
            if name.endswith(".csv"):
                writer = csv.DictWriter(file, held[0])
                writer.writeheader()
                writer.writerows(held)
            else:
                file.writelines(json.dumps(row) + "\n" for row in held)
