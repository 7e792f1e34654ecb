"""Plans: one file, readable and editable, refused for another model and wherever it is broken."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantpress.cache import WidthPlan
from quantpress.cache.saved.config_fingerprint import config_fingerprint
from quantpress.errors import CacheFileError, InvalidInputError
from tests.tiny_models import tiny_model

WIDTHS = {0: (4, 2), 1: (1, 8), 2: (3, 3)}


def plan(**changes: Any) -> WidthPlan:
    """A plan for the tiny Llama."""
    errors = {index: ({2: 0.5, 3: 0.125}, {2: 0.25}) for index in WIDTHS}
    about = {
        "text": "a novel",
        "press": "TurboQuant(4)",
        "method": "one-pass",
        "context": 4096,
        "bits": 2.75,
        "errors": errors,
    }
    fingerprint = config_fingerprint(tiny_model("llama").config)
    return WidthPlan("my-model", fingerprint, **{"widths": WIDTHS, **about, **changes})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    plan().save(path)
    return path


def test_a_plan_comes_back_from_its_file(file: Path) -> None:
    found = WidthPlan.load(file)
    assert found == plan() and repr(found) == repr(str(file))
    assert found.layer(1) == (1, 8) and found.mean_bits == 3.5
    assert file.stat().st_size == plan().save(file) and list(file.parent.iterdir()) == [file]
    assert repr(plan()) == "WidthPlan('my-model', 3 layers, mean 3.50 bits)"


def test_a_model_of_another_shape_is_refused_by_name(file: Path) -> None:
    found = WidthPlan.load(file)
    found.check(tiny_model("llama").config)
    with pytest.raises(
        CacheFileError, match=r"plan\.json has widths for my-model, not for qwen2: model_type"
    ) as e:
        found.check(tiny_model("qwen2").config)
    assert "was 'llama', is 'qwen2'" in str(e.value) and "run `quantpress fit MODEL`" in str(e.value)
    other = tiny_model("qwen2").config
    found.check(other, without=("model_type",))
    with pytest.raises(InvalidInputError, match=r"plan\.json has no widths of layer 7 \(it has 0, 1, 2\)"):
        found.layer(7)


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "width": (
        lambda f: f["layers"]["1"].update(keys=5),
        r'layers["1"]["keys"] is 5; give one of 1, 2, 3, 4, 8',
    ),
    "fraction": (lambda f: f["layers"]["1"].update(values=2.5), r'layers["1"]["values"] is 2.5'),
    "truth": (lambda f: f["layers"]["0"].update(values=True), r'layers["0"]["values"] is True'),
    "head": (lambda f: f["layers"]["1"].update(keys=[2, 5]), r'layers["1"]["keys"] is 5; give one of'),
    "no head": (lambda f: f["layers"]["1"].update(keys=[]), r'layers["1"]["keys"] is ()'),
    "heads": (
        lambda f: f["layers"]["1"].update(keys=[2, 3], values=[2, 3, 4]),
        r'layers["1"] has widths of 2 heads for the keys and of 3 for the values',
    ),
    "error of a head": (
        lambda f: f["errors"]["0"]["keys"].update({"2": [1, "a"]}),
        r"""errors["0"]["keys"]["2"] is [1, 'a'], not a divergence""",
    ),
    "side": (lambda f: f["layers"]["0"].pop("values"), r"""layers["0"] is {'keys': 4}; give both widths"""),
    "index": (lambda f: f["layers"].update(first={}), r'layers["first"] names no layer'),
    "none": (lambda f: f["layers"].clear(), "layers is {}; give the widths"),
    "layers": (lambda f: f.update(layers=[2, 2]), "layers is [2, 2], not a dict"),
    "model": (lambda f: f.pop("model"), "model is None, not a str"),
    "context": (lambda f: f.update(context="4k"), "context is '4k', not a int"),
    "error": (lambda f: f["errors"]["0"]["keys"].update({"2": -1}), r'errors["0"]["keys"]["2"] is -1'),
    "error width": (lambda f: f["errors"]["0"]["keys"].update({"6": 1}), r'errors["0"]["keys"] is 6'),
    "format": (lambda f: f.update(quantpress_plan=9), "quantpress_plan is 9, this quantpress"),
    "kind": (lambda f: f.pop("quantpress_plan"), "no quantpress_plan; give a file of `quantpress fit`"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_broken_file_is_named_with_key_and_value(name: str, file: Path) -> None:
    edit, reason = EDITS[name]
    contents = json.loads(file.read_text())
    edit(contents)
    file.write_text(json.dumps(contents))
    with pytest.raises(CacheFileError, match=re.escape(reason)) as error:
        WidthPlan.load(file)
    assert str(error.value).startswith(str(file))


def test_a_plan_by_head_comes_back_from_its_file(tmp_path: Path) -> None:
    errors = {0: ({2: (0.5, 0.25)}, {2: (0.125, 0.0)})}
    widths: Any = {0: ((4, 2), (2, 1)), 1: ((3, 2), 2), 2: (2, 2)}
    made = plan(widths=widths, errors=errors)
    made.save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["layers"]["1"] == {"keys": [3, 2], "values": 2}
    found = WidthPlan.load(tmp_path / "plan.json")
    assert found == made and found.widths == widths and found.by_head and not plan().by_head
    assert found.mean_bits == (3 + 1.5 + 2.5 + 2 + 2 + 2) / 6


def test_only_the_widths_and_the_model_are_needed(file: Path) -> None:
    contents = json.loads(file.read_text())
    for name in ("text", "press", "context", "bits", "errors"):
        del contents[name]
    file.write_text(json.dumps(contents))
    assert WidthPlan.load(file).widths == WIDTHS


@pytest.mark.parametrize(
    "contents", [b"{", b"\xff\xfe", b"[]", None], ids=["json", "bytes", "list", "missing"]
)
def test_what_is_no_plan_is_refused(contents: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(CacheFileError, match=rf"{re.escape(str(path))}.*`quantpress fit`"):
        WidthPlan.load(path)
    with pytest.raises(CacheFileError, match="cannot be written"):
        plan().save(tmp_path / "nowhere" / "plan.json")
