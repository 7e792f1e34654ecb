"""What plans of widths save in quality inside vLLM, each against one width of as many bytes.

    quantpress fit --method one-pass --bits 2.81 -o plan.json    in an environment with kvpress
    python benchmarks/vllm_plan.py plan.json quantpress_k3v2     in one with vLLM
    python benchmarks/vllm_plan.py plan.json quantpress_k3v2 other.json quantpress_3bit --json rows.json

Texts, the profile of keys, the forced tokens and KL are those of `vllm_quality.py`, in float32. `quantpress
fit` reads none of the texts that are scored. `ratio` is KL over that of the dtype beside the plan.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))  # a Python with PYTHONSAFEPATH does not look beside a script

import vllm_quality as quality
from forced_decoding import REQUESTS, Job

from quantpress.cache import WidthPlan
from quantpress.cache.engine_memory import EngineLayer, engine_widths
from quantpress.evaluation.results.statistics import mean_by_document, paired_ratio
from quantpress.pipelines.calibration import calibrate
from quantpress.pipelines.default_model import ensure_default_model


def token_bytes(config: Any, pairs: Sequence[tuple[int, int]]) -> float:
    """Bytes of a token in blocks whose layers have these widths."""
    layer = EngineLayer(config.num_key_value_heads, config.head_dim, config.head_dim)
    return sum(layer.block_bytes(*pair) for pair in pairs) / 128


def arms(folder: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each dtype and plan."""
    home = ensure_default_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(home)
    model = transformers.AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32).eval()
    torch.save(quality.texts(tokenizer, arguments), folder / "texts")
    profile = folder / "profile.safetensors"
    calibrate(model, tokenizer, {"documentation": quality.documentation()}, progress=False).save(profile)
    config, layers = model.config, model.config.num_hidden_layers
    del model
    job = {
        "model": str(home),
        "dtype": "float32",
        "texts": str(folder / "texts"),
        "context": arguments.context,
    }
    outputs = [str(folder / "logits")]
    own = quality.forced(folder, Job(**job, cache_dtype="auto", profile=None, outputs=outputs))[0]
    for file, dtype in zip(arguments.pairs[::2], arguments.pairs[1::2], strict=True):
        plan, base = WidthPlan.load(file), None
        planned = [plan.layer(index) for index in range(layers)]
        arm = f"plan, {plan.method}, mean {plan.mean_bits:.3f}"
        uniform = [engine_widths(dtype)] * layers
        for name, path, pairs in ((dtype, None, uniform), (arm, str(Path(file).resolve()), planned)):
            given = Job(**job, cache_dtype=dtype, profile=str(profile), outputs=outputs, plan=path)
            kl = quality.divergences(own, quality.forced(folder, given)[0])
            means = [sum(one) / len(one) for one in kl]
            base = base or means
            yield {
                "arm": name,
                "bytes_a_token": token_bytes(config, pairs),
                "widths": " ".join(f"{keys}/{values}" for keys, values in pairs),
                "kl": mean_by_document(kl),
                "ratio": paired_ratio(base, means),
                "by_document": means,
            }


def main(words: Sequence[str]) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "pairs", nargs="+", help="files of quantpress fit for the default model, a dtype behind each"
    )
    parser.add_argument("--documents", type=int, default=quality.DOCUMENTS)
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    arguments = parser.parse_args(words)
    arguments.words, arguments.context = words, quality.CONTEXT
    if not 1 <= arguments.documents <= REQUESTS:
        parser.error(f"--documents are 1 to {REQUESTS}")
    if len(arguments.pairs) % 2:
        parser.error("give a KV-cache dtype behind each plan")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in arms(Path(folder), arguments):
            rows.append(row)
            kl, ratio = f"{row['kl']:.5f}", f"{row['ratio']:.2f}"
            print(f"| {row['arm']} | {row['bytes_a_token']:,.0f} | {kl} | {ratio} |", flush=True)
            if arguments.json:
                head = quality.about(arguments) | {
                    "command": f"python benchmarks/vllm_plan.py {' '.join(words)}"
                }
                arguments.json.write_text(quality.record(head, rows))


if __name__ == "__main__":
    main(sys.argv[1:])
