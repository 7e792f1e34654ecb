"""The search in plain PyTorch, to which the kernel is held: `quantpress.quantization.trellis.path`."""

from quantpress.quantization.trellis import nearest_path as nearest_path_reference

__all__ = ["nearest_path_reference"]
