"""`quantpress memory`: its figures, its tables in terminals of any width, and the sizes it is given."""

import copy
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from quantpress import cli
from quantpress.cache import WidthPlan, host
from quantpress.cli import memory
from quantpress.cli.arguments import byte_count
from quantpress.errors import InvalidInputError
from quantpress.evaluation.sizing.model_outline import EXAMPLE_SHAPE
from quantpress.pipelines.report import format_bytes
from tests.pipelines.words import model_folder, ours, text
from tests.tiny_models import tiny_model

PRESSES = ("TurboQuant(bits=8)", "SnapKV(0.5, window_size=16) | TurboQuant(bits=2)")


def invoke(*arguments: str) -> Any:
    result = CliRunner().invoke(cli.app, ["memory", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_memory_prints_the_parts(tmp_path: Path) -> None:
    model = model_folder(tmp_path)
    options = ["-c", "700", "-p", PRESSES[0], "-p", PRESSES[1]]
    found = json.loads(invoke(model, *options, "--json").stdout)
    assert found["model"]["weights_bytes"] == sum(one.nbytes for one in tiny_model("llama").parameters())
    for row in found["presses"]:
        cache = row["cache"]
        parts = ("packed_bytes", "dense_bytes", "metadata_bytes")
        assert sum(cache[part] for part in parts) == cache["total_bytes"]
        assert row["ratio"] == pytest.approx(row["whole_bytes"] / cache["total_bytes"])
    whole = ours().read(text(699), press=None).memory  # a bos token more
    assert found["model"]["dtype"] == "float32" and found["presses"][0]["ratio"] == 1
    assert found["presses"][0]["cache"]["total_bytes"] == whole.total_bytes
    shown = " ".join(invoke(EXAMPLE_SHAPE, *options, "--gpu", "80GB").stdout.split())
    for words in ("TurboQuant(8)", "Weights: 15.0 GiB in bfloat16", "longest", "an estimate"):
        assert words in shown
    assert "The ratio is to all tokens uncompressed, in bfloat16." in shown


@pytest.mark.skipif(not host.HOLDS_STATES, reason="caches of this transformers cannot hold states")
def test_memory_of_a_hybrid_model(tmp_path: Path) -> None:
    """States are a column of their own; without them there is none."""
    tiny_model("qwen3_5").config.to_json_file(tmp_path / "config.json", use_diff=False)
    options = [str(tmp_path / "config.json"), "-c", "700", "-p", PRESSES[0]]
    for row in json.loads(invoke(*options, "--json").stdout)["presses"]:
        cache = row["cache"]
        parts = ("packed_bytes", "dense_bytes", "metadata_bytes", "state_bytes")
        assert sum(cache[part] for part in parts) == cache["total_bytes"] and cache["state_bytes"]
    shown = " ".join(invoke(*options).stdout.split())
    assert "states" in shown and "Only the 2 layers of full attention grow without end" in shown
    assert "states" not in invoke(EXAMPLE_SHAPE, *options[1:]).stdout.lower()


def test_memory_takes_other_weights() -> None:
    (own, lighter) = (
        memory.memory(EXAMPLE_SHAPE, gpu="24GB", weights=weights) for weights in (None, "4.7GB")
    )
    assert lighter.model.weights_bytes == 4_700_000_000
    assert all(b.context > a.context for a, b in zip(own.capacities, lighter.capacities, strict=True))


def test_memory_asks_for_the_weights_of_a_quantized_checkpoint(tmp_path: Path) -> None:
    config = copy.deepcopy(tiny_model("llama").config)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.to_json_file(tmp_path / "config.json", use_diff=False)
    place = str(tmp_path / "config.json")
    assert "weighs less" in invoke(place).stdout
    assert "weighs less" not in invoke(place, "--weights", "1MB").stdout


def column_texts(shown: str, count: int) -> list[list[str]]:
    """The texts of the columns of each table, headings first, without spaces."""
    tables: list[list[str]] = []
    for line in shown.splitlines():
        if line.startswith("┏"):
            tables.append([""] * line.count("┳") + [""])
        elif line[0:1] in ("┃", "│"):
            cells = re.split("[┃│]", line)[1:-1]
            tables[-1] = [old + "".join(new.split()) for old, new in zip(tables[-1], cells, strict=True)]
    assert len(tables) == count
    return tables


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("batch", [1, 1000])
def test_no_cell_is_cropped(width: int, batch: int) -> None:
    presses = ["TurboQuant(bits=3)", "AdaKV(SnapKV(0.5)) | TurboQuant(bits=4)"]
    sized = memory.memory(EXAMPLE_SHAPE, presses, gpu="80TB", batch=batch)
    for outcome, count in ((sized, 2), (memory.memory(names=True), 1)):
        console = Console(width=width, file=io.StringIO())
        console.print(outcome.__rich__())
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert max(map(len, shown.splitlines())) <= width
        group = outcome.__rich__()
        tables = [one for one in getattr(group, "renderables", [group]) if isinstance(one, Table)]
        for table, columns in zip(tables, column_texts(shown, count), strict=True):
            for column, found in zip(table.columns, columns, strict=True):
                assert found == "".join("".join(map(str, [column.header, *column.cells])).split())


def test_every_row_has_its_own_work_space() -> None:
    sized = memory.memory("llama-3.1-8b", ["SnapKV(0.5) | TurboQuant(bits=4)"], context=32768)
    plain, pressed = sized.plans
    assert plain.activation_bytes != pressed.activation_bytes
    shown = invoke("llama-3.1-8b", "-p", "SnapKV(0.5) | TurboQuant(bits=4)", "-c", "32768").stdout
    for plan in sized.plans:
        parts = (plan.cache.total_bytes, plan.activation_bytes, plan.total_bytes)
        cells = r"\s*│\s*".join(map(format_bytes, parts))
        assert re.search(cells, shown), shown
    assert "The shape is that of meta-llama/Llama-3.1-8B-Instruct." in shown


def test_names_are_listed() -> None:
    found = json.loads(invoke("--list", "--json").stdout)["models"]
    assert {"llama-3.1-8b", "qwen3-8b", "gemma-3-27b"} <= {one["name"] for one in found}
    with pytest.raises(InvalidInputError, match=r"names that need no hub: .*qwen3-8b"):
        memory.memory("no-such-model")


@pytest.mark.parametrize(
    ("text", "count"), [("80GB", 80 * 10**9), ("24 GiB", 24 * 2**30), ("1.5tb", 15 * 10**11), ("7 B", 7)]
)
def test_bytes_have_units(text: str, count: int) -> None:
    assert byte_count(text) == count


@pytest.mark.parametrize("text", ["", "GB", "80XB", "-1GB", "0GB", "1e3GB"])
def test_what_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="80GB"):
        byte_count(text)


def test_bytes_without_a_unit_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"'24' has no unit; write 24GB .* or 24GiB"):
        byte_count("24")


def test_memory_in_an_engine(tmp_path: Path) -> None:
    """The same figures in the table and in JSON; what is for an engine alone is refused elsewhere."""
    options = ["llama-3.1-8b", "--engine", "vllm", "--gpu", "80GB"]
    found = json.loads(invoke(*options, "--json").stdout)
    rows = found["kv_cache_dtypes"]
    assert [row["dtype"] for row in rows] == ["bfloat16", *(f"quantpress_{bits}bit" for bits in (4, 3, 2))]
    assert rows[1]["token_bytes"] == 32 * 8 * 136 and rows[1]["block_ratio"] == 512 / 136
    assert found["max_num_seqs"] == 64 and found["sink_entries"] == 1024
    shown = " ".join(invoke(*options).stdout.split())
    for row in rows:
        assert f"{row['token_bytes']:,.0f}" in shown and f"{row['tokens']:,}" in shown
    assert "--max-num-seqs 64" in shown and "1,024 prompts" in shown
    WidthPlan("of llama", {}, dict.fromkeys(range(32), (3, 2))).save(tmp_path / "plan.json")
    options += ["--plan", str(tmp_path / "plan.json"), "--kv-cache-dtype", "quantpress_k3v2"]
    pair, planned = json.loads(invoke(*options, "--json").stdout)["kv_cache_dtypes"][1:]
    assert planned == pair | {"dtype": str(tmp_path / "plan.json")}
    with pytest.raises(InvalidInputError, match=r"--plan is for --engine vllm; .* --press"):
        memory.memory("llama-3.1-8b", plan="plan.json")
    with pytest.raises(InvalidInputError, match="--kv-cache-dtype is for --engine"):
        memory.memory("llama-3.1-8b", kv_cache_dtype=["quantpress_4bit"])
    with pytest.raises(InvalidInputError, match=r"--max-num-seqs is for --engine vllm; .* give --batch"):
        memory.memory("llama-3.1-8b", max_num_seqs=3)
    with pytest.raises(InvalidInputError, match="takes no --press"):
        memory.memory("llama-3.1-8b", engine="vllm", press=["SnapKV"])
