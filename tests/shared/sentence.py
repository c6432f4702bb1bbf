"""Tiny sentence-transformers directories, written by the library itself, with random weights that are not zero."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import surgery

WORDS = (
    *("<pad>", "<s>", "</s>", "<unk>"),
    *(
        "the",
        "a",
        "cat",
        "dog",
        "sees",
        "tree",
        "red",
        "green",
        "is",
        "it",
        "yes",
        "no",
        "and",
        "what",
        "old",
        "says",
    ),
)
TEXTS = [
    "the cat sees a red tree and the old dog says no",
    "is it green",
    "what is it and what says the cat and the dog and the old old tree",
    "yes",
]
SIZES: dict[str, Any] = {"vocab_size": len(WORDS), "hidden_size": 32, "num_attention_heads": 4}
DEEP: dict[str, Any] = {
    **SIZES,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**DEEP),
    "mpnet": lambda: transformers.MPNetConfig(**DEEP, pad_token_id=0),
    # Three layers: a global one and two local ones, whose window is shorter than the texts.
    "modernbert": lambda: transformers.ModernBertConfig(
        **{**DEEP, "num_hidden_layers": 3}, local_attention=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        cls_token_id=1, sep_token_id=2,
    ),
    "t5": lambda: transformers.T5Config(
        vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
    "qwen3": lambda: transformers.Qwen3Config(
        **DEEP, num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2
    ),
}  # fmt: skip


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer that splits at spaces and adds an end token, which some models pool at."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    ).save_pretrained(folder)


def randomise(module: nn.Module, seed: int) -> None:
    """Give every weight and bias random values, so that none hides behind zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)


def transformer(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny transformers model with a tokenizer."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    made = transformers.AutoModel.from_config(config)
    if family == "t5":
        made = transformers.T5EncoderModel(config)
    randomise(made, seed)
    made.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def write(folder: Path, family: str = "bert", stages: Sequence[nn.Module] = (), **settings: Any) -> Path:
    """Write a sentence-transformers directory: a tiny transformers model, and the library's modules after it.

    Args:
        folder: Directory to write.
        family: Key of CONFIGS.
        stages: Modules after it; a mean over the tokens if there are none.
        settings: Arguments of SentenceTransformer, such as prompts.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    source = transformer(family, folder.with_name(f"{folder.name}-{family}"))
    after = list(stages) or [Pooling(32, "mean")]
    for number, stage in enumerate(after):
        randomise(stage, 10 + number)
    with quiet():
        made = SentenceTransformer(modules=[Transformer(str(source)), *after], device="cpu", **settings)
        made.save(str(folder), create_model_card=False)
    # By this name transformers 4 reads the tokenizer, too, with which optimum-onnx runs.
    config = folder / "tokenizer_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    # And by these names, which nearly all models on the hub have, every version of the library knows its modules.
    listed = json.loads((folder / "modules.json").read_text())
    for each in listed:
        each["type"] = f"sentence_transformers.models.{each['type'].rpartition('.')[2]}"
    (folder / "modules.json").write_text(json.dumps(listed))
    return folder


def opened(folder: Path | str, **more: Any) -> Any:
    """The library's own model of a directory."""
    from sentence_transformers import SentenceTransformer

    with quiet():
        return SentenceTransformer(str(folder), device="cpu", **more).eval()


@contextlib.contextmanager
def quiet():
    """Hide the library's progress bars."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def load(folder: Path | str, **more: Any) -> surgery.Program:
    return surgery.load(f"hf:{folder}", task="sentence-similarity", **more)


def features(model: Any, texts: Sequence[str], side: str = "right") -> dict[str, torch.Tensor]:
    """The inputs that the library makes of texts, padded on one side."""
    model.tokenizer.padding_side = side
    made = model.preprocess(list(texts))
    return {k: made[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in made}


def embed(program: surgery.Program, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The program's embeddings. Token types that the tokenizer does not give are those of a first sentence."""
    wanted = program.example_inputs[1]
    more = {"token_type_ids": torch.zeros_like(inputs["input_ids"])} if "token_type_ids" in wanted else {}
    return program.run(**{**more, **inputs})["sentence_embedding"]


def wanted(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The library's embeddings of the same inputs."""
    with torch.no_grad():
        return model(dict(inputs))["sentence_embedding"]
