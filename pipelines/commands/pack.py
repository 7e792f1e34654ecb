"""`quantpress pack`: read a text once, save the packed context."""

from dataclasses import asdict, dataclass

from quantpress.errors import InvalidInputError
from quantpress.pipelines.commands.loading import console, load_pipeline, model_name, print_json, read_text
from quantpress.pipelines.report import format_bytes

SUFFIX = ".kv.safetensors"


@dataclass(frozen=True)
class Packed:
    """What was saved.

    Args:
        file: where.
        model: that read the text.
        press: what it was read under.
        tokens: of the context.
        file_bytes: size of the file.
        resident_bytes: of the cache.
        bf16_bytes: what the kept tokens take in 16 bits.
        bits_per_value: true bits per kept number.
    """

    file: str
    model: str
    press: str
    tokens: int
    file_bytes: int
    resident_bytes: int
    bf16_bytes: int
    bits_per_value: float


def main(
    file: str,
    output: str | None = None,
    press: str = "TurboQuant",
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    json: bool = False,
) -> None:
    """Read a text under a press and save its cache.

    Args:
        file: of text; "-" for the standard input.
        output: the file to write; left out, the text's name with `SUFFIX`.
        press: as `parse_press` takes it.
        model: as for `load_pipeline`.
        device: as for `load_pipeline`.
        dtype: as for `load_pipeline`.
        json: print JSON.

    Raises:
        QuantPressError: the text, press or model cannot be used, or the file cannot be written.
    """
    if output is None and file == "-":
        raise InvalidInputError("text from the standard input has no name; give --output FILE")
    target = f"{file}{SUFFIX}" if output is None else output
    text, pipe = read_text(file), load_pipeline(model, device, dtype)
    context = pipe.read(text, press=press)
    size, memory = context.save(target), context.memory
    done = Packed(
        file=target,
        model=model_name(pipe),
        press=context.description,
        tokens=context.token_ids.shape[1],
        file_bytes=size,
        resident_bytes=memory.total_bytes,
        bf16_bytes=memory.bf16_bytes,
        bits_per_value=memory.bits_per_value,
    )
    if json:
        print_json(asdict(done))
        return
    console().print(
        f"{done.file}: {done.tokens:,} tokens in {format_bytes(size)}, {done.bits_per_value:.2f} bits a "
        f"value, read by {done.model} under {done.press}. It contains the text: only you can read it.",
        markup=False,
        highlight=False,
    )
