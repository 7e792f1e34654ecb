"""How `quantpress inspect` shows a model profile."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from quantpress.cli.output import Outcome, new_table

if TYPE_CHECKING:
    from quantpress.cache.saved.model_profile import ModelProfile
    from quantpress.quantization.transform import ChannelTransform


@dataclass(frozen=True)
class LayerStatistics:
    """The statistics of the keys of one layer.

    Args:
        index: index of the layer.
        kv_heads: number of KV heads.
        head_dim: dimension of the keys.
        mean: root mean square of the mean key over heads and channels.
        least_weight, largest_weight: of a channel.
    """

    index: int
    kv_heads: int
    head_dim: int
    mean: float
    least_weight: float
    largest_weight: float

    @classmethod
    def of(cls, index: int, transform: "ChannelTransform") -> "LayerStatistics":
        """From the transform of a layer."""
        parts = transform.tensors()
        mean, weight = parts["mean"], parts["weight"]
        root = float(mean.square().mean().sqrt())
        return cls(index, mean.shape[1], mean.shape[2], root, float(weight.min()), float(weight.max()))


@dataclass(frozen=True)
class Profile(Outcome):
    """A model profile.

    Args:
        file: path of the file.
        model: name of the model that was measured.
        text: name of the text that it read.
        tokens: number of tokens that were counted.
        piece_tokens: most tokens that were read at a time.
        written_by: version of quantpress.
        fingerprint: fields of the configuration that a model must share.
        layers: the layers with statistics.
    """

    file: str
    model: str
    text: str
    tokens: int
    piece_tokens: int
    written_by: str | None
    fingerprint: dict[str, Any]
    layers: tuple[LayerStatistics, ...]

    @classmethod
    def of(cls, file: str, profile: "ModelProfile") -> "Profile":
        """What is shown of a profile."""
        layers = tuple(LayerStatistics.of(*item) for item in profile.statistics.items())
        about = profile.model, profile.text, profile.tokens, profile.piece_tokens, profile.written_by
        return cls(file, *about, dict(profile.fingerprint), layers)

    def __rich__(self) -> RenderableType:
        columns = ("layer", "KV\nheads", "head_dim", "mean\nkey", "least\nweight", "largest\nweight")
        table = new_table(
            f"{self.file}: profile of {self.model}",
            columns,
            words=(),
            caption="Mean key: root mean square over heads and channels.",
        )
        for layer in self.layers:
            figures = (layer.mean, layer.least_weight, layer.largest_weight)
            shape = (layer.index, layer.kv_heads, layer.head_dim)
            table.add_row(*map(str, shape), *(f"{figure:.3f}" for figure in figures))
        about = (
            f"Measured on {self.tokens:,} tokens of {self.text}, at most {self.piece_tokens:,} at a time, by "
            f"quantpress {self.written_by}."
        )
        fields = ", ".join(f"{name} {value}" for name, value in self.fingerprint.items())
        return Group(table, Text(about), Text(f"For models with {fields}."))
