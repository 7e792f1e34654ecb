"""What packing asks of the host, which launches it between two forwards: few operations, and no waits."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from quantpress.cache import PackedLayer
from quantpress.kernels import encode, moments
from quantpress.kernels.encode import triton_encode
from quantpress.kernels.moments import triton_moments
from quantpress.pipelines.reading.read_context import read_context
from quantpress.presses import TurboQuant
from quantpress.presses.packing.pack_layers import Packer

LAYERS, TOKENS = 3, 300
WRITTEN = {"found_ptr": 0, "agree_ptr": 1, "scale0_ptr": 1}
VIEWS = ("view", "slice", "transpose", "unsqueeze", "detach", "alias", "expand", "t.default")
KERNELS = ("token_moments_kernel", "key_transform_kernel", "query_moment_kernel", "not_finite_kernel")


class Operations(TorchDispatchMode):
    """The names of the operations of PyTorch inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func).removeprefix("aten."))
        return func(*args, **(kwargs or {}))

    @property
    def at_work(self) -> list[str]:
        """All but views, which launch nothing."""
        return [name for name in self.names if not name.lstrip("_").startswith((*VIEWS, "unsafe_view"))]


class NoKernel:
    """Stands in for a kernel: counts launches, and writes what the host reads."""

    def __init__(self, kernel: Any, launches: Counter[str]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self._launches[self._kernel.__name__] += 1
            arguments = dict(zip(self._kernel.arg_names, args, strict=False)) | kwargs
            with _disable_current_modes():
                for name in WRITTEN.keys() & arguments.keys():
                    arguments[name].fill_(WRITTEN[name])

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Launches of kernels on a machine that seems to have a GPU."""
    counted = Counter[str]()
    for chooser in (encode, moments):
        monkeypatch.setattr(chooser, "runs_triton", lambda device: True)
    for name in KERNELS:
        kernel = NoKernel(getattr(triton_moments, name), counted)
        monkeypatch.setattr(triton_moments, name, kernel)
    kernel = NoKernel(triton_encode.encode_pages_kernel, counted)
    monkeypatch.setattr(triton_encode, "encode_pages_kernel", kernel)
    yield counted


def test_packing_a_layer_is_few_operations(launches: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=50, num_hidden_layers=LAYERS, head_dim=64, **sizes)
    model, found, waits = LlamaForCausalLM(config).bfloat16().eval(), list[Operations](), list[int]()
    pack, to_list = Packer.pack, torch.Tensor.tolist

    def counting(self: Packer, *args: Any) -> None:
        with Operations() as operations:
            pack(self, *args)
        found.append(operations)

    def waiting(self: torch.Tensor) -> Any:
        waits.append(self.numel())
        return to_list(self)

    monkeypatch.setattr(Packer, "pack", counting)
    monkeypatch.setattr(torch.Tensor, "tolist", waiting)
    cache = DynamicCache()
    with torch.no_grad():
        read_context(model, torch.arange(TOKENS)[None] % 50, cache, TurboQuant(3), progress=False)
    assert all(isinstance(layer, PackedLayer) and layer.packed_tokens for layer in cache.layers)
    assert len(found) == LAYERS
    for operations in found[1:]:  # the first layer makes constants
        assert len(operations.at_work) <= 29, Counter(operations.at_work)
        assert len(operations.names) <= 76, operations.names
    assert launches == dict.fromkeys(KERNELS, LAYERS) | {"encode_pages_kernel": 4 * LAYERS}
    assert len(waits) == 1, "all checks of a prefill are read at once"
    operations = Operations()
    with operations:
        for layer in cache.layers:
            assert isinstance(layer, PackedLayer)
            layer.reserve(200)
    assert len(operations.at_work) == 4 * LAYERS, "codes and scales of keys and of values"
