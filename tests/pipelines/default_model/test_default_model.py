"""The default model: its configuration, its tokenizer, and the conversion that made them."""

import json
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    __version__,
)

from quantpress.errors import ModelFilesError
from quantpress.evaluation.tasks.haystack import book_text
from quantpress.pipelines.default_model.convert import convert, rotary_rows

MISSING_BYTES = {4, 6, 0x13, 0x14, 0x16, 0x1D}  # control characters that the vocabulary never had
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CONTROL = (
    "<|endoftext|> <|im_start|> <|im_end|> <repo_name> <reponame> <file_sep> <filename> <gh_stars> "
    "<issue_start> <issue_comment> <issue_closed> <jupyter_start> <jupyter_text> <jupyter_code> "
    "<jupyter_output> <jupyter_script> <empty_output>"
)


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("model_type", "llama"),
        ("architectures", ["LlamaForCausalLM"]),
        ("vocab_size", 49152),
        ("hidden_size", 576),
        ("intermediate_size", 1536),
        ("num_hidden_layers", 30),
        ("num_attention_heads", 9),
        ("num_key_value_heads", 3),
        ("head_dim", 64),
        ("max_position_embeddings", 8192),
        ("rms_norm_eps", 1e-5),
        ("tie_word_embeddings", True),
        ("dtype", torch.bfloat16),
        ("bos_token_id", 1),
        ("eos_token_id", 2),
        ("pad_token_id", 2),
    ],
)
def test_configuration(default_model_path: Path, field: str, expected: object) -> None:
    assert getattr(AutoConfig.from_pretrained(default_model_path), field) == expected


def test_rotary_base(default_model_path: Path) -> None:
    assert AutoConfig.from_pretrained(default_model_path).rope_parameters["rope_theta"] == 100000.0


def test_config_names_the_transformers_version(default_model_path: Path) -> None:
    written = json.loads((default_model_path / "config.json").read_text())["transformers_version"]
    if written != __version__ and re.fullmatch(r"5\.\d+\.\d+", written):
        pytest.skip(f"the user's cache holds the model as transformers {written} has written it")
    assert written == __version__


def test_model_has_the_known_size_and_tied_embeddings(default_model: PreTrainedModel) -> None:
    assert sum(parameter.numel() for parameter in default_model.parameters()) == 134515008
    assert default_model.lm_head.weight is default_model.model.embed_tokens.weight


def test_generation_stops_at_the_end_of_the_turn(default_model_path: Path) -> None:
    generation = GenerationConfig.from_pretrained(default_model_path)
    assert (generation.eos_token_id, generation.pad_token_id) == (2, 2)


def test_special_tokens(default_tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(default_tokenizer) == default_tokenizer.vocab_size == 49152
    assert (default_tokenizer.bos_token, default_tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (default_tokenizer.eos_token, default_tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (default_tokenizer.pad_token, default_tokenizer.pad_token_id) == ("<|im_end|>", 2)
    assert (default_tokenizer.unk_token, default_tokenizer.unk_token_id) == ("<|endoftext|>", 0)
    assert default_tokenizer.model_max_length == 8192
    assert default_tokenizer.convert_ids_to_tokens(list(range(17))) == CONTROL.split()
    assert default_tokenizer.encode(CONTROL.replace(" ", "")) == list(range(17))


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_nothing_is_put_before_or_after_a_text(
    default_tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool
) -> None:
    tokens = default_tokenizer.encode("Hello world", add_special_tokens=add_special_tokens)
    assert tokens == [19556, 905]


def test_digits_stand_alone(default_tokenizer: PreTrainedTokenizerBase) -> None:
    assert default_tokenizer.tokenize("is: 12345.") == ["is", ":", "Ġ", "1", "2", "3", "4", "5", "."]


def test_prose_takes_few_tokens(default_tokenizer: PreTrainedTokenizerBase) -> None:
    text = book_text(20000)
    assert 3.5 < len(text) / len(default_tokenizer.encode(text)) < 5.0


def test_chat_template(default_tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    text = default_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    turns = [f"system\n{SYSTEM}", "user\nHi", "assistant\nHello."]
    assert text == "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns) + "<|im_start|>assistant\n"
    tokens = default_tokenizer.apply_chat_template(messages, return_dict=False, add_generation_prompt=True)
    assert (tokens.count(1), tokens.count(2)) == (4, 3)
    assert default_tokenizer.decode(tokens) == text


def test_chat_template_keeps_a_system_message(default_tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = default_tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"


@pytest.mark.parametrize(
    "text",
    [
        "naïve café, “quoted” — 1,234.5 €",
        "  two  spaces\n\n\ttab \r\n",
        "日本語と한국어",
        "Ελληνικά русский עברית",
        "🙂👩‍👩‍👧🏳️‍🌈",
    ],
    ids=["latin", "spaces", "cjk", "scripts", "emoji"],
)
def test_text_comes_back(default_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert default_tokenizer.decode(default_tokenizer.encode(text)) == text


def test_any_text_comes_back(default_model_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(default_model_path)

    @given(
        st.text(
            st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]).filter(
                lambda c: ord(c) not in MISSING_BYTES
            )
        )
    )
    def comes_back(text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text)) == text

    comes_back()


def test_a_saved_tokenizer_is_the_same(default_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    default_tokenizer.save_pretrained(tmp_path)
    again, text = AutoTokenizer.from_pretrained(tmp_path), book_text(3000)
    assert again.encode(text) == default_tokenizer.encode(text)
    assert again.chat_template == default_tokenizer.chat_template


def test_rows_of_queries_and_keys_are_put_back() -> None:
    heads, half = 3, 4
    ours = torch.arange(heads * 2 * half * 5).reshape(heads * 2 * half, 5).numpy()
    theirs = np.empty_like(ours)
    for head in range(heads):
        for pair in range(half):
            for side in range(2):
                theirs[(head * half + pair) * 2 + side] = ours[(head * 2 + side) * half + pair]
    assert (rotary_rows(theirs, heads) == ours).all()
    assert not (theirs == ours).all()


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_theta": 50000.0, "rope_type": "default"},
        rms_norm_eps=1e-5,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return model


def write_gguf(model: LlamaForCausalLM, path: Path, architecture: str = "llama", pre: str = "smollm") -> None:
    """What llama.cpp would make of `model`, with the bytes, 47 made-up words and 17 control tokens."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    letters = [chr(index) for index in range(0x100, 0x100 + 256)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*CONTROL.split(), *letters, "ĀĀ", *(f"word{index}" for index in range(46))])
    writer.add_token_types([3] * 17 + [1] * 303)
    writer.add_token_merges(["Ā Ā"])
    for index, add in enumerate([writer.add_unk_token_id, writer.add_bos_token_id, writer.add_eos_token_id]):
        add(index)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        value = weight.numpy()
        for projection, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            if projection in name:  # as llama.cpp's own conversion permutes them
                rows = value.reshape(heads, 2, -1, config.hidden_size).swapaxes(1, 2)
                value = np.ascontiguousarray(rows.reshape(value.shape))
        writer.add_tensor(names.get_name(name, (".weight",)) or name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_converted_model_computes_what_the_original_does(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    write_gguf(tiny_llama, tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", tmp_path, progress=False)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    converted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(320, (2, 40))
    with torch.inference_mode():
        torch.testing.assert_close(converted(ids).logits, tiny_llama(ids).logits, rtol=0, atol=0)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 320


@pytest.mark.parametrize(
    ("change", "message"),
    [({"architecture": "qwen2"}, "qwen2"), ({"pre": "llama-bpe"}, "llama-bpe")],
    ids=["architecture", "tokenizer"],
)
def test_another_kind_of_model_is_refused(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, change: dict[str, str], message: str
) -> None:
    write_gguf(tiny_llama, tmp_path / "tiny.gguf", **change)
    with pytest.raises(ModelFilesError, match=message):
        convert(tmp_path / "tiny.gguf", tmp_path, progress=False)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(bytes(1000))
    with pytest.raises(ModelFilesError, match=r"other\.gguf is not a GGUF file"):
        convert(tmp_path / "other.gguf", tmp_path, progress=False)
