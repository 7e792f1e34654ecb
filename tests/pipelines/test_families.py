"""Which families of models are packed on which transformers, as docs/results/families.json has it.

`make families` runs this file on every tested version and records what comes out; docs/versions.md shows it.
"""

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quantpress import enable
from quantpress.cache import PackedLayer, host
from quantpress.errors import UnsupportedModelError
from tests.hybrid_models import REFUSED, SHARING, WORKING
from tests.presses.reading import lossless
from tests.tiny_models import MODELS, prompt, tiny_model

FILE = Path(__file__).parents[2] / "docs" / "results" / "families.json"
RECORDS = "QUANTPRESS_RECORD_FAMILIES" in os.environ
NAMES = sorted({*MODELS, *WORKING, *SHARING, *REFUSED})
TOKENS = 230  # of which one page, beside the windows of `lossless`
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "no_repeat_ngram_size": 1}


def outcome(family: str) -> str:
    """What comes of `enable` and `generate`, with a codec that loses nothing."""
    if family not in MODELS:
        return "not in this version"
    model, ids = tiny_model(family, "eager" if family in ("gpt_oss", "bloom") else "sdpa"), prompt(TOKENS)
    try:
        with enable(model, lossless()):
            got = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    except UnsupportedModelError:
        return "refused"
    assert torch.equal(got.sequences, model.generate(ids, **GREEDY))
    layers = got[host.generate_cache()].layers
    packed = sum(isinstance(layer, PackedLayer) and layer.packed_tokens > 0 for layer in layers)
    assert packed or family == "mistral_sliding", "nothing is packed"
    kept = f"{packed} of {len(layers)} layers"
    return "packed" if packed == len(layers) else f"{kept} packed"


def record(family: str, found: str) -> None:
    known = json.loads(FILE.read_text(encoding="utf-8"))
    known["date"], known["machine"] = str(datetime.date.today()), f"a CPU, {platform.machine()}"
    here = known["outcomes"].setdefault(transformers.__version__, {})
    known["outcomes"][transformers.__version__] = dict(sorted({**here, family: found}.items()))
    FILE.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


@pytest.mark.skipif(transformers.__version__ not in host.TESTED, reason="recorded on tested versions only")
@pytest.mark.filterwarnings("ignore:the queries of .* are not known")
@pytest.mark.filterwarnings("ignore:.*sliding.*:UserWarning")
@pytest.mark.parametrize("family", NAMES)
def test_what_the_page_says(family: str) -> None:
    found = outcome(family)
    if RECORDS:
        record(family, found)
    known = json.loads(FILE.read_text(encoding="utf-8"))["outcomes"][transformers.__version__]
    assert known[family] == found


def test_every_tested_version_is_recorded() -> None:
    outcomes = json.loads(FILE.read_text(encoding="utf-8"))["outcomes"]
    assert tuple(outcomes) == host.TESTED
    assert all(sorted(found) == NAMES for found in outcomes.values())
