"""What a plan of widths saves in quality inside vLLM, against one width of as many bytes.

    quantpress fit --dtype float32 --bits 2.9 -o plan.json      in an environment with kvpress
    python benchmarks/vllm_plan.py plan.json                    in one with vLLM
    python benchmarks/vllm_plan.py plan.json --against quantpress_k3v2 quantpress_3bit --json rows.json

Texts, the profile of keys, the forced tokens and KL are those of `vllm_quality.py`. Plans of `quantpress fit`
have read none of the texts that are scored. `ratio` is KL over that of the first dtype.
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
    wanted = {name: (name, None, [engine_widths(name)] * layers) for name in arguments.against}
    for file in arguments.plans:
        plan = WidthPlan.load(file)
        name = f"plan, {plan.method}, mean {plan.mean_bits:.3f}"
        pairs = [plan.layer(index) for index in range(layers)]
        wanted[name] = arguments.against[0], str(Path(file).resolve()), pairs
    first: list[float] = []
    for name, (dtype, plan, pairs) in wanted.items():
        given = Job(**job, cache_dtype=dtype, profile=str(profile), outputs=outputs, plan=plan)
        kl = quality.divergences(own, quality.forced(folder, given)[0])
        means = [sum(one) / len(one) for one in kl]
        first = first or means
        yield {
            "arm": name,
            "bytes_a_token": token_bytes(config, pairs),
            "widths": " ".join(f"{keys}/{values}" for keys, values in pairs),
            "kl": mean_by_document(kl),
            "ratio": paired_ratio(first, means),
            "by_document": means,
        }


def main(words: Sequence[str]) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("plans", nargs="+", help="files of quantpress fit, for the default model")
    parser.add_argument("--against", nargs="+", default=["quantpress_k3v2"], metavar="DTYPE")
    parser.add_argument("--documents", type=int, default=quality.DOCUMENTS)
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    arguments = parser.parse_args(words)
    arguments.words, arguments.context = words, quality.CONTEXT
    if not 1 <= arguments.documents <= REQUESTS:
        parser.error(f"--documents are 1 to {REQUESTS}")
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
