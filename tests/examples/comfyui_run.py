"""Run by `test_comfyui_node`, in ComfyUI's environment: the node in ComfyUI's own sampler, on tiny models.

    python comfyui_run.py NODE_FOLDER

Prints one line of JSON for each model.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

NODE = Path(sys.argv[1])
sys.argv = [sys.argv[0], "--cpu", "--disable-all-custom-nodes"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_base  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.patcher_extension  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.supported_models  # noqa: E402
import torch  # noqa: E402

CPU = torch.device("cpu")
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 32,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "legacy": False,
    "dtype": torch.float32,
}
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 32,
    "context_in_dim": 32,
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": False,
    "dtype": torch.float32,
}


def patcher(name: str) -> Any:
    """A tiny model of ComfyUI's with random weights."""
    if name == "unet":
        model = comfy.model_base.BaseModel(comfy.supported_models.SD15(dict(UNET)), device=CPU)
    else:
        model = comfy.model_base.Flux(comfy.supported_models.Flux(dict(FLUX)), device=CPU)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU)


def sample(model: Any, channels: int) -> torch.Tensor:
    """Two steps of Euler."""
    chance = torch.Generator().manual_seed(1)
    text = [
        [torch.randn(1, 20, 32, generator=chance), {"pooled_output": torch.randn(1, 32, generator=chance)}]
    ]
    noise = torch.randn(1, channels, 24, 24, generator=chance)
    result: torch.Tensor = comfy.sample.sample(
        model,
        noise,
        2,
        1.5,
        "euler",
        "normal",
        text,
        text,
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=1,
    )
    return result


def main() -> None:
    """Both models: without the node, with it, through a further clone, and without again."""
    spec = importlib.util.spec_from_file_location("turboquant_node", NODE / "__init__.py")
    node: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(node)
    assert comfy.patcher_extension.WrappersMP.OUTER_SAMPLE == node.OUTER_SAMPLE
    patch = node.NODE_CLASS_MAPPINGS["TurboQuantPatch"]()
    for name, channels in (("unet", 4), ("flux", 16)):
        model = patcher(name)
        assert patch.patch(model, False, "4") == (model,)
        exact = sample(model, channels)
        (patched,) = patch.patch(model, True, "8")
        further = patched.clone()
        results = [sample(one, channels) for one in (patched, patched, further)]
        records = [one.attachments["turboquant"].record for one in (patched, further)]
        said = {
            "model": name,
            "calls": [len(record.calls) for record in records],
            "skipped": records[0].skipped.total(),
            "output_error": records[0].output_error,
            "shapes": sorted({call.key_shape[1:] for call in records[0].calls}),
            "changed": not torch.equal(results[0], exact),
            "same": torch.equal(results[0], results[1]) and torch.equal(results[0], results[2]),
            "error": float((results[0] - exact).square().sum() / exact.square().sum()),
            "restored": torch.equal(sample(model, channels), exact) and not model.attachments,
        }
        print(json.dumps(said))


if __name__ == "__main__":
    main()
