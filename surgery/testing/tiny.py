"""A tiny model of transformers with a tokenizer, for the tests of plugins. No network is needed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from surgery.common.errors import MissingExtraError


def text_classifier(folder: Path, words: Iterable[str], classes: int = 2) -> str:
    """Write a random BERT of two layers of 32 features with a classifier, and a tokenizer that splits at spaces.

    Args:
        folder: Directory to write.
        words: Vocabulary; other words are one unknown token.
        classes: Number of classes.

    Returns:
        The reference for `surgery.load(ref, task="text-classification")`.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    try:
        import tokenizers
        import transformers
    except ImportError:
        raise MissingExtraError("transformers", "hf") from None
    known = {word: number for number, word in enumerate(("[PAD]", "[UNK]", *dict.fromkeys(words)))}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(known),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    config.num_labels = classes
    seed = torch.initial_seed()
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    torch.manual_seed(seed)
    return f"hf:{folder}"
