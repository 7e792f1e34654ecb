"""The task "kv-press-text-generation": read a context under a press, then answer questions about it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import Cache, Pipeline

from quantpress.cache import CacheMemory, cache_memory, host
from quantpress.errors import InvalidInputError
from quantpress.pipelines import arguments as given
from quantpress.pipelines.argument_values import check_values
from quantpress.pipelines.capture.eligibility import JoinKernels, check_choice, refuse, why_not
from quantpress.pipelines.contexts.cached_context import CachedContext
from quantpress.pipelines.decoding import (
    asking,
    capturing_answers,
    check_decoding,
    generate_ids,
    generation_mode,
)
from quantpress.pipelines.default_model import check_dtype
from quantpress.pipelines.press_argument import as_press, enabled_press, hand_tokenizer
from quantpress.pipelines.prompt import chat_form, check_positions, cut_to, token_ids, warn_of_positions
from quantpress.pipelines.question_hint import hint_at_unseen_question
from quantpress.pipelines.ranks import check_clocks, check_same, share_chance
from quantpress.pipelines.reading.planned import Reading
from quantpress.pipelines.reading.question_aware import (
    IdsRead,
    check_question_aware,
    question_aware_readings,
)
from quantpress.pipelines.reading.read_context import read_context
from quantpress.pipelines.report import Report, Stopwatch
from quantpress.pipelines.rollback import model_rollback
from quantpress.presses.base_press import BasePress
from quantpress.presses.traits import short_repr


class TextGenerationPipeline(Pipeline):
    """Answers questions about a context whose KV cache is compressed while it is read.

    Everything that kvpress's own pipeline takes works and gives the same greedy answers. All arguments may be
    given when the pipeline is made or when it is called; those of the call take precedence. It differs from
    kvpress's pipeline on purpose in that

    - every question is answered as if it were asked first, with every kind of press and cache layer;
    - a composition that contains a special press (decoding, rerotating, ...) is treated like that press;
    - an answer ends if its first token is an end token, where kvpress continues;
    - a context longer than the model's positions is an error, where kvpress cuts it at the tokenizer's limit;
    - an unknown argument is an error, where kvpress ignores it.

    Keyword Args:
        model, tokenizer, device, ...: as for every transformers pipeline. The default is the default model,
            in the dtype that `QUANTPRESS_DTYPE` names, or else the faster one here.
        press: a press, a press class, a list of them (`Compose`), or text such as
            "SnapKV(0.5) | TurboQuant(bits=3)" (`parse_press`). None keeps the whole cache, or takes the press
            of a model that `enable` was called on.
        question: asked after the context. Without one the model continues the context.
        questions: several of them, instead of `question`.
        question_aware: read the question together with the context, so that a press sees it when it chooses
            what to keep. Everything in front of the answer but its last token is read under the press, and
            nothing is read twice. The prompt has the same tokens in the same order. Each of several
            questions has a reading of its own, which takes as long as the first. A `cache` that is given
            holds the question, too. kvpress's evaluation calls this query_aware, earlier compress_questions;
            both names are taken here.
        answer_prefix: how each answer begins.
        max_context_length: the largest number of tokens; a longer context is cut, with a warning. None never
            cuts.
        enable_thinking: passed to the chat template.
        cache: an empty transformers cache to use, which holds the compressed context afterwards. None makes a
            DynamicCache.
        max_new_tokens: the largest number of tokens in an answer, 50 by default.
        report: add a `Report` of memory and time to the result. With question_aware its tokens and bytes
            include the question, those of the largest reading if there are several; its seconds are sums.
        progress: show a bar over the layers while reading. None shows it in a terminal if reading takes long.
        chunk_tokens: see `chunked_prefill`. 0 never cuts, None cuts contexts of more than 4096 tokens.
        cuda_graph: decode by replaying a CUDA graph (`captured_decoding`). None does so where possible, on a
            CUDA device. True refuses what rules it out (the CPU, beams, assisted decoding, a press that acts
            during decoding, a context too short to be packed). False never does.
        compile: first run the captured step through torch.compile(fullgraph=True), which fuses the small
            kernels and takes about a minute for each model and shape. What rules a graph out is refused.
        join_kernels: which kernels of ours the graph, and on CUDA the reading of the context, has in place of
            PyTorch's, as for `captured_decoding`.
            "exact" leaves logits equal to the last bit, False leaves the model's own kernels.
        **generation: everything else that `model.generate` takes: do_sample, temperature, top_p, num_beams,
            stop_strings, streamer, prompt_lookup_num_tokens, assistant_model, logits_processor, ... Greedy
            decoding is the default, and takes only the special tokens from the model's own configuration.
            With do_sample=True the model's own configuration fills in the rest. Processors see the question
            and the answer, but not the context, which no longer exists as ids; with question_aware they see
            only the last token of the question. Each beam has a copy of the cache.

    Returns:
        {"answer": str}, or {"answers": [str, ...]} with `questions`; with `report=True` also "report". A list
        of contexts gives a list of these; contexts are read one after the other.

    Raises:
        EmptyContextError: the context, or a question with what the chat form adds, has no token.
        ContextTooLongError: the context has more tokens than the model has positions (`position_count`).
        UnsupportedModelError: the model does not keep what it reads in a DynamicCache: a hybrid or
            state-space model, or one in training mode with gradient checkpointing.
        CompositionError: the presses do not go together.
        InvalidInputError: another argument cannot be used.

    `read` reads a context once. What it returns can be asked about in place of a text, and saved.

    Threads may share a pipeline: the model answers one call after the other, in the order of the calls.

    Example:
        >>> # pipe = pipeline("kv-press-text-generation", press=Compose([SnapKV, TurboQuant]))
        >>> # pipe("A long text ...", question="What is it about?")["answer"]
    """

    model: Any
    tokenizer: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        check_dtype(options.get("dtype"))  # of a model that is loaded already, transformers ignores it
        super().__init__(*args, **options)
        if self.tokenizer is None:
            raise InvalidInputError(
                f"there is no tokenizer for {type(self.model).__name__}; give tokenizer=, such as "
                "AutoTokenizer.from_pretrained(...)"
            )

    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict[str, Any], ...]:
        parameters = given.with_own_names(parameters)
        check_values(parameters)
        rest = {name: value for name, value in parameters.items() if name not in given.LOADING}
        reading = {name: rest.pop(name) for name in given.READING if name in rest}
        running = {name: rest.pop(name) for name in given.RUNNING if name in rest}
        shaping = {}
        if "question" in rest or "questions" in rest:
            shaping["single_question"] = rest.get("questions") is None
            reading["questions"] = given.asked(rest.pop("question", None), rest.pop("questions", None))
        if "press" in running:
            running["press"] = as_press(running["press"])
            hand_tokenizer(running["press"], self.model, self.tokenizer)
        given.check_generation_arguments(rest)
        return reading, {**running, **rest}, shaping

    def __call__(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Answer questions about a context, or about each of a list of contexts. See the class."""
        if args:  # transformers would leave them out
            unnamed = ", ".join(map(short_repr, args))
            raise InvalidInputError(
                f"{unnamed} behind the context has no name; write question=..., press=..."
            )
        context = kwargs.pop("context", inputs)
        batch_size = kwargs.get("batch_size", self._batch_size)
        if batch_size not in (None, 1):
            raise InvalidInputError(
                f"batch_size is {batch_size!r}; contexts are read one at a time, since each keeps "
                "tokens of its own: leave batch_size out"
            )
        if isinstance(context, (list, tuple, Iterator)):
            return [self(one, **kwargs) for one in context]
        if isinstance(context, CachedContext):
            given.check_asking(kwargs)
            kwargs.setdefault("press", context.press)
        return super().__call__(context, **kwargs)

    def read(self, context: str, **options: Any) -> CachedContext:
        """Read a context once, to ask about it any number of times, or to save it.

        Args:
            context: the text.
            **options: press, max_context_length, enable_thinking, chunk_tokens and progress, as for a call.

        Raises:
            EmptyContextError, ContextTooLongError, CompositionError, UnsupportedModelError: as for a call.
            InvalidInputError: another argument is given, or the press keeps notes of the context on itself.

        Example:
            >>> # context = pipe.read("A long text ...")
            >>> # context.save("text.safetensors")
            >>> # pipe(context, questions=["Who?", "Where?"])["answers"]
        """
        return self.read_planned(self.plan_reading(context, **options))

    def plan_reading(self, context: str, **options: Any) -> Reading:
        """What `read` would read, and how; nothing is read. The arguments and errors are those of `read`."""
        given.check_reading(options)
        reading, running, _ = self._sanitize_parameters(**options)
        how = {**self._forward_params, **running}
        how = {name: how[name] for name in ("chunk_tokens", "press", "progress") if name in how}
        if how.get("press") is None:
            how["press"] = enabled_press(self.model)
        form = {**self._preprocess_params, **reading}
        ids, after = self._prompt(context, form.get("max_context_length"), form.get("enable_thinking", False))
        return Reading(ids, after, **how)

    def read_planned(self, plan: Reading) -> CachedContext:
        """Read what `plan_reading` returned."""
        check_same(self.model, context=plan.ids.tolist(), press=short_repr(plan.press))
        cache, ids = host.empty_cache(self.model), plan.ids.to(self.device)
        how: dict[str, Any] = {
            "press": plan.press,
            "chunk_tokens": plan.chunk_tokens,
            "progress": plan.progress,
        }
        with self.device_placement(), torch.no_grad(), model_rollback(self.model):
            position = read_context(self.model, ids, cache, **how)
            return CachedContext.of(self.model, cache, ids, position, plan.press, plan.after)

    def preprocess(  # type: ignore[override]
        self,
        context: str | CachedContext,
        questions: Sequence[str] = ("",),
        answer_prefix: str | None = None,
        max_context_length: int | None = None,
        enable_thinking: bool = False,
    ) -> dict[str, Any]:
        """Token ids of a context and of the questions that follow it.

        Returns:
            "context_ids", [1, T] int64; "questions_ids", a list of [1, Q] int64; "asks", whether a question
            has text; "cached", the context if it was read before.
        """
        cached = context if isinstance(context, CachedContext) else None
        if isinstance(context, CachedContext):
            context_ids, after = context.token_ids, context.after
        else:
            context_ids, after = self._prompt(context, max_context_length, enable_thinking)
        asked = [f"{question}{after}{answer_prefix or ''}" for question in questions]
        return {
            "context_ids": context_ids,
            "questions_ids": [token_ids(self.tokenizer, one, "question") for one in asked],
            "asks": any(one.strip() for one in questions),
            **({} if cached is None else {"cached": cached}),
        }

    def _prompt(
        self, context: str, max_context_length: int | None, enable_thinking: bool
    ) -> tuple[torch.Tensor, str]:
        """Ids [1, T] of a context in its chat form, and the text that follows a question."""
        before, after = chat_form(self.tokenizer, context, enable_thinking=enable_thinking)
        context_ids = cut_to(token_ids(self.tokenizer, before, "context"), max_context_length)
        check_positions(self.model.config, context_ids.shape[1])
        return context_ids, after

    def _forward(  # type: ignore[override]
        self,
        input_tensors: dict[str, Any],
        press: BasePress | None = None,
        cache: Cache | None = None,
        report: bool = False,
        progress: bool | None = None,
        chunk_tokens: int | None = None,
        cuda_graph: bool | None = None,
        compile: bool = False,
        join_kernels: JoinKernels = True,
        question_aware: bool | None = None,
        **generation: Any,
    ) -> dict[str, Any]:
        if press is None and "cached" not in input_tensors:  # a cached context was read before
            press = enabled_press(self.model)
        check_choice(cuda_graph, compile, join_kernels)
        if cuda_graph is False and compile:
            raise InvalidInputError("compile=True, but cuda_graph=False; leave one of them out")
        config = given.answer_config(self.model, generation)
        mode = generation_mode(config, generation)
        check_decoding(mode, generation, press)
        reasons = why_not(device=self.model.device, press=press, mode=mode)
        refuse(reasons, cuda_graph, compile)
        if config.stop_strings is not None or "assistant_tokenizer" in generation:
            generation["tokenizer"] = self.tokenizer
        context_ids, questions = input_tensors["context_ids"], input_tensors["questions_ids"]
        readings: list[IdsRead] = [(context_ids, questions)]
        if question_aware:
            check_question_aware(len(questions), "cached" in input_tensors, cache)
            readings = question_aware_readings(context_ids, questions, press)
        elif input_tensors["asks"]:
            hint_at_unseen_question(press)
        check_same(
            self.model,
            context=context_ids.tolist(),
            questions=[one.tolist() for one in questions],
            question_aware=bool(question_aware),
            press=short_repr(press),
            generation=config.to_diff_dict(),
        )
        check_clocks(self.model, config)
        warn_of_positions(self.model.config, context_ids, questions, config.max_new_tokens)
        watch = Stopwatch(self.model.device) if report else None
        how: dict[str, Any] = {"chunk_tokens": chunk_tokens, "progress": progress, "watch": watch}
        how["join_kernels"] = bool(join_kernels) and not compile
        graphs = None if cuda_graph is False or reasons else (cuda_graph, compile, join_kernels)
        ids: list[torch.Tensor] = []
        memories: list[tuple[CacheMemory, int]] = []
        for read_ids, asked in readings:
            inputs = {**input_tensors, "context_ids": read_ids}
            with self._context(inputs, cache, press, how) as (kept, position), ExitStack() as steps:
                if cuda_graph or compile:
                    ruled_out = why_not(model=self.model, cache=kept, shared=(self.model, kept))
                    refuse(ruled_out, cuda_graph, compile)
                if graphs is not None:
                    new_tokens = max(one.shape[1] for one in asked) + config.max_new_tokens
                    steps.enter_context(capturing_answers(self.model, kept, new_tokens, *graphs))
                memories += [(cache_memory(kept), read_ids.shape[1])] if report else []
                share_chance(self.model, config)
                for question in asked:
                    with asking(self.model, kept, press, watch):
                        where = (self.model, kept, read_ids, question, position)
                        ids.append(generate_ids(*where, config, generation))
        answers = [self.tokenizer.decode(one, skip_special_tokens=True) for one in ids]
        result: dict[str, Any] = {"answers": answers}
        if watch is not None:
            memory, seen = max(memories, key=lambda one: one[0].total_bytes)
            result["report"] = Report.measured(memory, seen, watch.seconds, sum(map(len, ids)))
        return result

    @contextmanager
    def _context(
        self, inputs: dict[str, Any], cache: Cache | None, press: BasePress | None, how: dict[str, Any]
    ) -> Iterator[tuple[Cache, int]]:
        """The context in a cache and the next position, read now or before."""
        cached: CachedContext | None = inputs.get("cached")
        if cached is not None:
            with model_rollback(self.model), cached.opened(self.model) as kept:
                yield kept, cached.tokens_seen
            return
        kept = host.empty_cache(self.model) if cache is None else cache
        with model_rollback(self.model, keep_masks=cache is not None):
            yield kept, read_context(self.model, inputs["context_ids"], kept, press, **how)

    def postprocess(  # type: ignore[override]
        self, model_outputs: dict[str, Any], single_question: bool = True
    ) -> dict[str, Any]:
        """Name the answers as kvpress does."""
        if not single_question:
            return model_outputs
        others = {name: value for name, value in model_outputs.items() if name != "answers"}
        return {"answer": model_outputs["answers"][0], **others}
