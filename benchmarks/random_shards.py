"""A model with random weights that torchrun's processes share. Each makes its own shards; no file is written.

`from_pretrained(folder, tp_plan="auto")` would read what one process has written, 16 GB for an 8B model. Here
a model is made on the meta device, split by transformers' own plan, and each process draws the numbers of its
shards. All draw with one seed, so that weights that every process has are the same. The shards of one weight
are the same too, which does not matter to times and bytes.
"""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    distribute_model,
    initialize_tensor_parallelism,
)
from transformers.integrations.tensor_parallel import _get_parameter_tp_plan as plan_of

SPREAD = 0.02  # standard deviation of the weights


def shared_model(config: PretrainedConfig, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """A model split over the processes that torchrun has started, as `tp_plan="auto"` splits one.

    Args:
        config: of a Llama, or of a model with its rotary embeddings.
        dtype: of the weights.
        seed: of their numbers, the same for all processes.
    """
    device, mesh, count = initialize_tensor_parallelism("auto")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = distribute_model(model, "auto", None, mesh, count)
    chance = torch.Generator(device).manual_seed(seed)
    for name, weight in list(model.named_parameters()):
        style = plan_of(name, model.tp_plan)
        shape = tuple(weight.shape)
        if style is not None:
            layer = ALL_PARALLEL_STYLES[style]
            layer.device_mesh, layer.rank = mesh, mesh.get_local_rank()
            shape = layer.get_expected_sharded_shape(shape)
        own = torch.ones(shape, dtype=dtype, device=device)
        if weight.dim() > 1:
            own.normal_(0, SPREAD, generator=chance)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(own, requires_grad=False))
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config, device=device)  # its frequencies are no parameters
    return model.eval()
