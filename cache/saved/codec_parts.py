"""Codecs as plain values, with a digest of what follows from them: rotations, codebooks, sketch.

The digest notices what the parameters do not say: another random stream behind the same seed, or other
codebooks. Codes read with those would decode to noise.
"""

import hashlib
from dataclasses import asdict
from functools import lru_cache

import torch
from torch import Tensor

from quantpress.cache.parts import Parts, rebuild, register_maker
from quantpress.codecs.page_codec import PageCodec, RawPages, ScalarPages
from quantpress.errors import InvalidInputError
from quantpress.quantization.spec import CodecSpec

_STEP = 2.0**-20  # rotations are made from sines and factorizations, whose last bits differ between machines


def codec_parts(codec: PageCodec) -> Parts:
    """What a codec is, for a file.

    Raises:
        InvalidInputError: not one of ours, so nobody could read its pages later.
    """
    if type(codec) is ScalarPages:
        return Parts("scalar_codec", {**codec.spec.to_dict(), "constants": constants_digest(codec.spec)})
    if type(codec) is RawPages:
        return Parts("raw_codec", asdict(codec))
    raise InvalidInputError(
        f"the codec {type(codec).__name__} cannot be saved; pages of ScalarPages and RawPages can"
    )


def codec_of(parts: Parts) -> PageCodec:
    """The codec that `codec_parts` described."""
    codec: PageCodec = rebuild(parts, "scalar_codec", "raw_codec")
    return codec


@lru_cache(maxsize=64)
def constants_digest(spec: CodecSpec) -> str:
    """SHA-256 of a codec's rotations, codebooks and sketch, to a precision that every machine reproduces."""
    digest = hashlib.sha256()
    for group in range(len(spec.groups)):
        digest.update(_grid(spec.rotation_of(group).matrix()))
        digest.update(_grid(torch.tensor(spec.codebook_of(group).levels, dtype=torch.float64, device="cpu")))
    if spec.estimator == "prod":
        digest.update(_grid(spec.sketch_matrix()))
    return digest.hexdigest()


def _grid(values: Tensor) -> bytes:
    return (values.double() / _STEP).round().to(torch.int64).numpy().tobytes()


def _scalar(parts: Parts) -> ScalarPages:
    about = dict(parts.about)
    noted = about.pop("constants", None)
    spec = CodecSpec.from_dict(about)
    if constants_digest(spec) != noted:
        raise InvalidInputError(
            f"the rotation of {spec} is not the one that the pages were packed with (another seed, or "
            "another random stream); pack the context again"
        )
    return ScalarPages(spec)


register_maker("scalar_codec", _scalar)
register_maker("raw_codec", lambda parts: RawPages(**parts.about))
