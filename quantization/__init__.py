"""The mathematics of the codec: rotations, codebooks, bit budgets and channel transforms.

A head's vector x is coded as

    y = transform(x)                 channels centred, balanced and ordered      transform.py
    y = R y / |R y|                  rotated per channel group, on a sphere      rotation.py
    code = nearest level per channel the density of its coordinates is known     codebook.py
           or nearest path of levels                                             trellis

A `CodecSpec` says with how many bits, and how the scale is stored. Definitions are exact to float64.
"""

from quantpress.quantization.bounds import (
    lloyd_max_distortion,
    paper_mse_bound,
    paper_product_bound,
    shannon_distortion,
)
from quantpress.quantization.budget import ChannelGroup, split_channels
from quantpress.quantization.codebook import Codebook, lloyd_max
from quantpress.quantization.rotation import Rotation
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform, key_statistics, value_statistics

__all__ = [
    "ChannelGroup",
    "ChannelTransform",
    "Codebook",
    "CodecSpec",
    "Rotation",
    "key_statistics",
    "lloyd_max",
    "lloyd_max_distortion",
    "paper_mse_bound",
    "paper_product_bound",
    "shannon_distortion",
    "split_channels",
    "value_statistics",
]
