"""docs/migration.md: every block that says what to write now runs, and does what its text says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sybil import Example
from transformers import TextGenerationPipeline

import quantpress
from quantpress.cache import PackedLayer
from tests.docs.markdown import CONTEXT_TOKENS as TOKENS
from tests.docs.markdown import ROOT, blocks, fence, shared_names
from tests.docs.markdown import run as run_blocks
from tests.pipelines.words import text

PAGE = "docs/migration.md"
TEXT = (ROOT / PAGE).read_text(encoding="utf-8")
SECTIONS = dict(section.split("\n", 1) for section in TEXT.split("\n## ")[1:])


def blocks_of(section: str, **names: Any) -> list[Example]:
    """The blocks of a section that run: not those that show another project's calls."""
    running = [block for block in blocks(ROOT / PAGE, **names) if fence(block) == ("python", "")]
    return [
        b for b in running if b.document.text[: b.start].rpartition("\n## ")[2].startswith(f"{section}\n")
    ]


@pytest.fixture
def names() -> dict[str, Any]:
    """What pages share."""
    return shared_names()


def run(section: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """The names after each block."""
    return run_blocks(blocks_of(section, **names))


def packed(cache: Any) -> bool:
    return all(isinstance(layer, PackedLayer) and layer.packed_tokens > 0 for layer in cache.layers)


def relative(exact: torch.Tensor, got: torch.Tensor) -> float:
    return float((exact - got).square().sum() / exact.square().sum())


def test_every_section_is_tested() -> None:
    tested = {"tqai", "aither-kvcache", "turboquant-pytorch", "ComfyUI's TurboQuantPatch", "kvpress"}
    assert set(SECTIONS) == tested | {"The OnlyTerp reference, `turboquant`", "vLLM's turboquant"}
    assert sum(len(blocks_of(section, model=None)) for section in SECTIONS) == 13


def test_tqai(names: dict[str, Any]) -> None:
    once, chat = run("tqai", names)
    assert once["output"].shape[1] == TOKENS + 20
    assert packed(chat["first"].past_key_values) and chat["second"].shape[1] > TOKENS + 40
    assert chat["first"].past_key_values.evicted


def test_aither(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    plain, hybrid, paged = run("aither-kvcache", names)
    assert relative(plain["keys"], plain["restored"]) == pytest.approx(0.0093, rel=0.1)  # of 4 bits
    assert "distortion" in capsys.readouterr().out
    stored = 8 * hybrid["packed"].nbytes / (640 * 128)  # 600 vectors in pages of 128
    assert stored == pytest.approx(3.5 + 2 * 16 / 128 + 16 / 640)  # two scales; the order of channels
    query = names["queries"][:, :, -1:]
    exact = torch.nn.functional.scaled_dot_product_attention(query, names["keys"], names["values"])
    assert paged["paged"].blocks(0) == [0] and 0 < relative(exact, paged["output"]) < 0.05


def test_turboquant_pytorch(names: dict[str, Any]) -> None:
    after, fidelity = run("turboquant-pytorch", names)
    exact = after["queries"] @ after["keys"].mT
    assert after["scores"].shape == exact.shape
    assert float((after["scores"] - exact).mean()) == pytest.approx(
        0, abs=0.2
    )  # unbiased; scores are about 11
    assert relative(after["values"], after["restored"]) == pytest.approx(0.034, rel=0.15)
    assert 0.9 < fidelity["report"].mean("cosine") < 1


def test_onlyterp(names: dict[str, Any]) -> None:
    cached, preset = run("The OnlyTerp reference, `turboquant`", names)
    assert packed(cached["cache"]) and cached["output"].shape[1] > 20
    assert preset["press"].bits == 3 and not preset["press"].mean_key


def test_comfyui(names: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (after,) = run("ComfyUI's TurboQuantPatch", names)
    assert len(after["patch"].record.calls) == 3 * 20
    assert "potential saving" in capsys.readouterr().out
    target = re.search(r'ln -s "\$PWD/(\S+)"', TEXT)
    assert target is not None and (ROOT / target.group(1) / "__init__.py").is_file()


def test_kvpress(names: dict[str, Any]) -> None:
    pipeline, context = run("kvpress", names)
    assert pipeline["answer"].split()
    assert packed(context["cache"]) and context["cache"].layers[0].get_seq_length() == 315


def test_vllm(names: dict[str, Any]) -> None:
    run("vLLM's turboquant", names)
    rows = re.findall(r"^\| `(turboquant_\w+)` \| `(.*)` \|$", SECTIONS["vLLM's turboquant"], re.MULTILINE)
    assert len(rows) == 4
    widths = {}
    for name, call in rows:
        with eval(call, {**names, "enable": quantpress.enable}) as enabled:
            quantizer = enabled.press.quantizer
            widths[name] = (quantizer.key_bits or quantizer.bits, quantizer.value_bits or quantizer.bits)
            answer = TextGenerationPipeline(model=names["model"], tokenizer=names["tokenizer"])
            assert answer(text(300), max_new_tokens=2, do_sample=False)[0]["generated_text"]
    assert list(widths.values()) == [(8, 4), (4, 4), (3, 4), (3, 3)]
