"""A Hugging Face cache made up on the spot: the names that kvpress's tests ask for, as tiny random models.

transformers and huggingface_hub look files up in it by themselves when they are offline: nothing is patched.
"""

import json
from pathlib import Path

import torch
from kvpress.presses.expected_attention_with_stats import ExpectedAttentionStats
from kvpress.presses.qfilter_press import QFilters
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

UNIT_TEST_MODELS = ("MaxJeblick/llama2-0b-unit-test", "maxjeblick/llama2-0b-unit-test")
REVISION = "0" * 40
VOCABULARY = 3072  # the tests draw ids below 3000
# What the tests ask about: their words become one token each, as in Llama's vocabulary.
SENTENCES = """
This is a test article. It was written on 2022-01-01.
When was this article written? What animal jumps over the dog?
The quick brown fox jumps over the lazy dog.
What is the best KV cache compression library in the world ?
"""
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n", "▁"]


def write_hub(home: Path) -> None:
    """Fill HF_HOME.

    Args:
        home: an empty folder.
    """
    model = _model()
    for name in UNIT_TEST_MODELS:
        folder = _snapshot(home, name)
        model.save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
        _press_data(home, name, model.config)


def _snapshot(home: Path, name: str) -> Path:
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / REVISION
    folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(REVISION)
    return folder


def _model() -> LlamaForCausalLM:
    """Two layers of two heads of 6 channels, as the model of that name: the tests name its shapes."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
        max_position_embeddings=4096,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Words, single digits and punctuation, with a space in front: Llama's token counts for `SENTENCES`."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    digits, marks = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Punctuation()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), digits, marks])
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=CHARACTERS,
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES.splitlines() * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    state = json.loads(backend.to_str())
    # Not as added tokens: those make loading the tokenizer slow, which the tests do a hundred times.
    state["model"]["vocab"] |= {f"⟨{index}⟩": index for index in range(backend.get_vocab_size(), VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )


def _press_data(home: Path, name: str, config: LlamaConfig) -> None:
    """Filters and statistics that two presses look up by the model's name."""
    shape = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    with torch.random.fork_rng():
        torch.manual_seed(0)
        QFilters(*shape).save_pretrained(_snapshot(home, f"nthngdy/{name.split('/')[1]}_qfilt"))
    stats = ExpectedAttentionStats(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        dataset_name="kmfoda/booksum",
        model_name=name,
        num_samples=100,
        sample_seq_len=1000,
        n_sink=4,
    )
    stats.query_cov.data += torch.eye(config.head_dim)
    stats.save_pretrained(_snapshot(home, stats.stats_id()))
