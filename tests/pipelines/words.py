"""A tiny tokenizer, texts for it, and pipelines of tiny models."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quantpress.pipelines.text_generation import TextGenerationPipeline
from tests.tiny_models import VOCABULARY, tiny_model
from tests.versions import kvpress_pipeline

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<answer>", "\n"]
WORDS = [f"w{index}" for index in range(VOCABULARY - len(SPECIAL))]
TEMPLATE = (
    "<s>{% for message in messages %}<user> {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<answer> {% if enable_thinking %}w0 {% endif %}{% endif %}"
)


@cache
def word_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a word, with or without a chat template."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="removed")
    backend.add_special_tokens(["<pad>", "<s>", "</s>", "<user>", "<answer>"])
    backend.add_tokens(["\n"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE if chat else None
    return tokenizer


def text(tokens: int, seed: int = 0) -> str:
    """Random words."""
    chance = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[index] for index in torch.randint(len(WORDS), (tokens,), generator=chance).tolist())


def ours(family: str = "llama", chat: bool = False, **options: object) -> TextGenerationPipeline:
    """Our pipeline with a tiny model."""
    return TextGenerationPipeline(model=tiny_model(family), tokenizer=word_tokenizer(chat), **options)


def theirs(family: str = "llama", chat: bool = False) -> Any:
    """kvpress's pipeline with the same model."""
    return kvpress_pipeline(model=tiny_model(family), tokenizer=word_tokenizer(chat))


def model_folder(folder: Path) -> str:
    """Save a tiny model and its tokenizer to a folder, and return it."""
    tiny_model("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)
