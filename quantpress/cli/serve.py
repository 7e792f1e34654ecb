"""`quantpress serve`: a model behind transformers' own server, with the cache of every request compressed."""

import socket
from contextlib import closing, suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantpress.cli.arguments import Device, Dtype, Press, Store, StoreBytes, check_loading, store_bound
from quantpress.errors import InvalidInputError, QuantPressError

if TYPE_CHECKING:
    from quantpress.pipelines.contexts.store import ContextStore
    from quantpress.pipelines.enabling.serving import Answer
    from quantpress.pipelines.text_generation import TextGenerationPipeline
    from quantpress.presses.base_press import BasePress

NEEDED = ("fastapi", "openai", "pydantic", "uvicorn")


def serve(
    model: Annotated[
        str | None, typer.Argument(help="Id or folder of a model that chats; left out, the default model.")
    ] = None,
    press: Press = "TurboQuant.preset('balanced')",
    host: Annotated[str, typer.Option(help="Address to listen at; there is no password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 for any that is free.", min=0, max=65535)] = 8000,
    store: Store = None,
    store_bytes: StoreBytes = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Serve a model over OpenAI's API and compress the cache of every request. Ctrl-C ends it."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise InvalidInputError(f"`quantpress serve` needs more packages: pip install {' '.join(missing)}")
    most = store_bound(store, store_bytes)
    check_loading(model, device, dtype)
    with closing(bound(host, port)) as listening:
        from quantpress.cli.loading import load_pipeline, model_name
        from quantpress.pipelines.enabling.enable import enable
        from quantpress.pipelines.enabling.served_contexts import ServedContexts
        from quantpress.pipelines.enabling.serving import ModelServer
        from quantpress.pipelines.press_argument import as_press, hand_tokenizer

        made = as_press(press)
        if made is None:
            raise InvalidInputError(f"press {press!r} compresses nothing: `transformers serve` does as much")
        kept = None if store is None else _opened(store, most, made)
        pipe = load_pipeline(model, device, dtype)
        hand_tokenizer(made, pipe.model, pipe.tokenizer)
        contexts = None if kept is None else ServedContexts(pipe, kept, made)
        with (
            enable(pipe.model, made),
            closing(ModelServer(pipe.model, pipe.tokenizer, model_name(pipe), _say, contexts)) as served,
        ):
            listening.listen()
            about = _size(pipe, made) + ([] if kept is None else _kept(kept))
            typer.echo(_welcome(pipe, press, listening.getsockname(), about))
            with suppress(KeyboardInterrupt):  # uvicorn raises it once it has ended
                served.server.run(sockets=[listening])


def bound(host: str, port: int) -> socket.socket:
    """A socket that will listen, so that a wrong address is refused before a model is loaded.

    Raises:
        InvalidInputError: the address is not one of this machine, or the port is taken.
    """
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except OSError as error:
        made.close()
        why = error.strerror or str(error)
        raise InvalidInputError(
            f"cannot listen at {host}, port {port}: {why}; give another --host, or --port 0 for a free one"
        ) from error
    return made


def _opened(path: str, most: int | None, press: "BasePress") -> "ContextStore":
    """The store, once it is clear that contexts under this press can be in it."""
    from quantpress.pipelines.contexts.cached_context import check_saved
    from quantpress.pipelines.contexts.store import ContextStore
    from quantpress.presses.traits import short_repr

    try:
        check_saved(press)
    except InvalidInputError as error:
        raise InvalidInputError(
            f"press {short_repr(press)} acts during decoding, and a stored context cannot; leave out "
            "--store, or what acts during decoding"
        ) from error
    return ContextStore(path, most)


def _welcome(pipe: "TextGenerationPipeline", press: str, address: Any, about: list[str]) -> str:
    from quantpress.cli.loading import model_name

    host, port = address[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    name, dtype = model_name(pipe), str(pipe.model.dtype).removeprefix("torch.")
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    return "\n".join(
        [
            f"{name} in {dtype} on {pipe.model.device}, press {press}.",
            *about,
            f"Listening at {url} (OpenAI's API). Ctrl-C ends it. For example:",
            f"  curl {url}/chat/completions -H 'Content-Type: application/json' -d '{body}'",
        ]
    )


def _size(pipe: "TextGenerationPipeline", press: "BasePress") -> list[str]:
    """What the longest context takes, if that does not depend on the text."""
    from quantpress.cli.loading import model_name
    from quantpress.evaluation.sizing.memory_plan import Planner
    from quantpress.evaluation.sizing.model_outline import ModelOutline
    from quantpress.pipelines.report import format_bytes

    try:
        outline = ModelOutline.of(model_name(pipe), pipe.model)
        plan = Planner(outline, press).plan(outline.positions or 8192)
    except QuantPressError:
        return []
    about = "" if plan.exact else "about "
    sizes = format_bytes(plan.cache.total_bytes), format_bytes(plan.whole_bytes)
    return [f"{plan.context:,} tokens take {about}{sizes[0]} of cache, {sizes[1]} uncompressed."]


def _kept(store: "ContextStore") -> list[str]:
    from quantpress.pipelines.report import format_bytes

    most = "without a bound" if store.max_bytes is None else f"up to {format_bytes(store.max_bytes)}"
    return [f"Conversations are kept in {store.path}, {most}."]


def _say(answer: "Answer") -> None:
    from quantpress.pipelines.report import format_bytes

    memory = answer.memory
    kept = max(layer.tokens_kept for layer in memory.layers)
    prompt = f"{answer.prompt_tokens:,} tokens read"
    if answer.stored_tokens:
        prompt = f"{answer.stored_tokens:,} of {answer.prompt_tokens:,} tokens from the store"
    typer.echo(
        f"{prompt}, {answer.new_tokens:,} new, {kept:,.0f} kept in "
        f"{format_bytes(memory.total_bytes)}: {memory.bits_per_value:.2f} bits a value",
        err=True,
    )
