"""What a code is: how pages of vectors become codes and come back.

protocol.py    `PageCodec`, what the cache and attention ask of a codec
scalar.py      TurboQuant: rotation, scalar codes, one scale per vector
trellis.py     the same with trellis codes
head_groups.py a codec for each group of KV heads; heads.py   some heads of a tensor
raw.py         the vectors as they are
uniform.py     plain integers and KIVI's scheme
block_hadamard.py  the same behind a rotation of blocks; fp8.py   8-bit floats with one scale
turboquant.py  TurboQuant as an object of its own, outside a cache
estimate.py    inner products with its codes; benchmark.py, reports.py   how fast, how exact, how large
parts.py       what a codec or a cache is made of, as it is saved

The codecs are imported here so that saved caches can name them.
"""

from quantpress.codecs.block_hadamard import BlockHadamardPages
from quantpress.codecs.fp8 import Fp8Pages
from quantpress.codecs.head_groups import HeadGroups
from quantpress.codecs.protocol import PageCodec, Planes, codec_of
from quantpress.codecs.raw import RawPages
from quantpress.codecs.scalar import ScalarPages
from quantpress.codecs.trellis import TrellisPages
from quantpress.codecs.uniform import UniformPages

__all__ = [
    "BlockHadamardPages",
    "Fp8Pages",
    "HeadGroups",
    "PageCodec",
    "Planes",
    "RawPages",
    "ScalarPages",
    "TrellisPages",
    "UniformPages",
    "codec_of",
]
