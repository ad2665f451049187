"""Our cache in every forward and every ``generate`` of an attached model, and no other.

Transformers makes a cache in three places: ``generate`` before its loop, a model's forward where it
was given none, and the user. The first two are answered here; a cache of somebody else is refused,
and after a forward it is checked that the model kept its keys and values in ours.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from threading import get_ident
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from quantpage.errors import CacheError, UnsupportedModel
from quantpage.integrations.hf_transformers.cache.paged_cache import QuantPageCache
from quantpage.integrations.hf_transformers.cache.paged_layer import CacheOptions
from quantpage.integrations.hf_transformers.hooks.functions import NAME
from quantpage.integrations.hf_transformers.hooks.own import refuse_other_attention
from quantpage.integrations.hf_transformers.loading.model import text_config
from quantpage.integrations.hf_transformers.modules.arguments import (
    cache_argument,
    cache_name,
    caches_in,
    parameters,
    take_cache,
)
from quantpage.integrations.hf_transformers.pages.lazy import kept

_ORDINARY = (None, "dynamic", "dynamic_full", "hybrid")
"""Values of ``cache_implementation`` that ask for nothing but Transformers' default."""


@dataclass(frozen=True, slots=True)
class _Frame:
    """A forward that is under way."""

    module: nn.Module
    cache: QuantPageCache | None
    """None: nobody asked for a cache."""
    before: int
    """Tokens that it held."""


class Supply:
    """The hooks of one attachment.

    new_cache: makes an empty cache. options: what attach was asked for. configs: those that name
    our attention. A forward inside another one (a model's body, a language model among encoders)
    uses the outermost one's cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        new_cache: Callable[[], QuantPageCache],
        options: CacheOptions,
        configs: Sequence[Any],
    ) -> None:
        self._model, self._new_cache, self._options = model, new_cache, options
        self._configs = configs
        self._under_way = threading.local()
        self._running: dict[object, int] = {}
        """Forwards of all threads: the thread of each."""
        self._closing = False

    def install(self, undo: list[Callable[[], None]]) -> None:
        """Hook every decoder in the model; undo: is given what takes each hook back."""
        undo.insert(0, self._open_again)
        for module in decoders(self._model):
            _hooked.add(module)
            undo.append(partial(_hooked.discard, module))
            self._hook_forward(module, undo)
            before = module.register_forward_pre_hook(self._before, with_kwargs=True)
            after = module.register_forward_hook(self._after, always_call=True)
            undo += [before.remove, after.remove]
            _keep_from_compiling(module, undo)
            _keep_from_copying(module, undo)
        for module in generators(self._model):
            self._hook_generate(module, undo)
        # The list is undone from its end: no forward runs while hooks are taken off.
        undo.append(self._close)

    def _close(self) -> None:
        """Wait until the forwards of other threads are over; those that come after wait, too."""
        if get_ident() in self._running.values():
            raise CacheError("detach: expected to be called when no forward is under way here")
        self._closing = True
        while self._running:
            time.sleep(1e-3)

    def _open_again(self) -> None:
        self._closing = False

    def _hook_forward(self, module: Any, undo: list[Callable[[], None]]) -> None:
        own = vars(module).get("forward")
        forward = module.forward

        @wraps(forward)
        def whole(*args: Any, **kwargs: Any) -> Any:
            return self._run(module, partial(forward, *args, **kwargs))

        def put_back() -> None:
            if own is None:
                vars(module).pop("forward", None)
            else:
                module.forward = own

        undo.append(put_back)
        module.forward = whole

    @torch.compiler.disable
    def _run(self, module: nn.Module, act: Callable[[], Any]) -> Any:
        """A forward, entirely or not at all; ``_after`` hears of no Ctrl-C."""
        frames, outer, number = self._frames(), self._depth(), object()
        depth = len(frames)
        mine = depth > outer and frames[-1].module is module
        try:
            try:
                if not outer:
                    self._enter(number)
                self._under_way.depth = depth
                if not mine or frames[-1].cache is None:
                    return act()
                return frames[-1].cache.forward(act)
            except BaseException:
                if mine:
                    del frames[depth - 1 :]
                raise
            finally:
                self._leave(number, outer)
        finally:
            # Again: Ctrl-C may have come just before the line above.
            self._leave(number, outer)

    def _enter(self, number: object) -> None:
        self._running[number] = get_ident()
        while self._closing:
            self._running.pop(number, None)
            time.sleep(1e-3)
            self._running[number] = get_ident()

    def _leave(self, number: object, outer: int) -> None:
        self._under_way.depth = outer
        self._running.pop(number, None)

    def _hook_generate(self, module: Any, undo: list[Callable[[], None]]) -> None:
        generate, prepare = module.generate, module._prepare_cache_for_generation
        inputs, name = module.prepare_inputs_for_generation, cache_name(module)

        @wraps(generate)
        def named(*args: Any, **kwargs: Any) -> Any:
            # A caller may use either name of the argument; this Transformers knows one.
            given = take_cache(kwargs)
            return generate(*args, **kwargs, **({} if given is None else {name: given}))

        def ours(config: Any, model_kwargs: dict[str, Any], *args: Any, **rest: Any) -> Any:
            wanted = config.cache_implementation
            if wanted not in _ORDINARY:
                raise ValueError(
                    f"cache_implementation: expected none while a model is attached, got {wanted!r}"
                )
            given = take_cache(model_kwargs)
            if given is None and config.use_cache is not False:
                given = self._new_cache()
            if given is not None:
                self._refuse_foreign(given)
                config.cache_implementation = None
                model_kwargs[name] = given
            return prepare(config, model_kwargs, *args, **rest)

        @wraps(inputs)
        def behind(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not module.config.is_encoder_decoder:
                kwargs |= _behind_cache(input_ids, kwargs)
            return inputs(input_ids, *args, **kwargs)

        def continuous(*_: Any, **__: Any) -> Any:
            raise ValueError(
                "init_continuous_batching: expected a model that is not attached, as continuous "
                "batching keeps a cache of its own, unquantized; quantpage.engine answers many "
                "requests from pages"
            )

        ours_instead = {"generate": named, prepare.__name__: ours, inputs.__name__: behind}
        if hasattr(module, "init_continuous_batching"):
            ours_instead["init_continuous_batching"] = continuous
        for attribute, one in ours_instead.items():
            setattr(module, attribute, one)
            undo.append(partial(vars(module).pop, attribute, None))

    def _frames(self) -> list[_Frame]:
        if not hasattr(self._under_way, "frames"):
            self._under_way.frames = []
        return self._under_way.frames

    def _depth(self) -> int:
        """Forwards of this thread that run."""
        return getattr(self._under_way, "depth", 0)

    @torch.compiler.disable
    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        name = cache_argument(module)
        names = parameters(module)
        if name in names[: len(args)]:
            # A cache among the arguments without names: all of them get theirs.
            args, kwargs = (), {**dict(zip(names, args, strict=False)), **kwargs}
        given = take_cache(kwargs)
        frames = self._frames()
        # Frames of forwards that Ctrl-C kept from beginning after their hook had run.
        del frames[self._depth() :]
        if given is not None:
            if frames and frames[-1].cache is None and not isinstance(given, QuantPageCache):
                # Made by the forward around this one, which has none of ours (training).
                frames.append(_Frame(module, None, 0))
                return args, {**kwargs, cache_name(module): given}
            self._refuse_foreign(given)
        if not frames and given is None and self._wants_cache(module, kwargs):
            given = self._new_cache()
        if not frames and given is None and self._options.mask is not None:
            raise ValueError(
                "mask: expected a forward with a cache, in whose pages it is applied, got "
                + ("training" if module.training else "use_cache=False")
            )
        if given is not None:
            refuse_other_attention(self._configs, NAME)
            _refuse_arguments(module, {**dict(zip(names, args, strict=False)), **kwargs})
            kwargs[cache_name(module)] = given
            mask = {**dict(zip(names, args, strict=False)), **kwargs}.get("attention_mask")
            given.rows.refuse_other_padding(mask)
            if given.rows.attention_mask is None:
                given.rows.attention_mask = mask
                told = _tokens({**dict(zip(names, args, strict=False)), **kwargs})
                given.rows.given = None if told is None else told.shape[1]
        frames.append(_Frame(module, given, 0 if given is None else max(given.lengths())))
        return args, kwargs

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        frames = self._frames()
        if not frames or frames[-1].module is not module:
            return
        frame = frames.pop()
        if frame.cache is not None and not frames:
            frame.cache.rows.attention_mask = None
        # Without an output an exception is on its way.
        if frames or frame.cache is None or output is None:
            return
        _keep_shared(output)
        name = type(module).__name__
        other = [each for each in caches_in(output) if each is not frame.cache]
        if other:
            raise UnsupportedModel(
                f"{name}: expected it to use the cache that it was given, and it made "
                f"{type(other[0]).__name__} of its own, which is not quantized"
            )
        lengths = frame.cache.lengths()
        if max(lengths) == frame.before:
            raise UnsupportedModel(
                f"{name}: expected keys and values of its layers, and it put none into its cache"
            )
        if len(lengths) > 1:
            raise UnsupportedModel(
                f"{name}: expected every layer to take the new tokens, and its layers hold "
                f"{min(lengths)} to {max(lengths)}"
            )

    def _refuse_foreign(self, given: Any) -> None:
        """ValueError for another's cache, and for one that would go on by another rule."""
        if not isinstance(given, QuantPageCache):
            raise ValueError(
                "past_key_values: expected None or a cache of this attachment (new_cache()), got "
                f"{type(given).__name__}, which would stay unquantized"
            )
        made, mine = given.options, self._options
        if not made.ledger.is_of(mine.ledger):
            raise ValueError(
                "past_key_values: expected a cache of this model, got one of another model, "
                f"{made.ledger.model}"
            )
        if (made.formats, made.mask) != (mine.formats, mine.mask):
            wanted = f"{mine.formats.name} and the mask {mine.mask}"
            raise ValueError(
                f"past_key_values: expected a cache of this attachment, of {wanted}, got one of "
                f"another, of {made.formats.name} and the mask {made.mask}"
            )

    def _wants_cache(self, module: nn.Module, kwargs: dict[str, Any]) -> bool:
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            config: Any = text_config(module.config)
            use_cache = getattr(config, "use_cache", True)
        return bool(use_cache) and not module.training


_hooked: WeakSet[nn.Module] = WeakSet()
"""Decoders of attached models."""


def is_hooked(module: nn.Module) -> bool:
    """Whether a decoder belongs to a model that is attached."""
    return module in _hooked


def decoders(model: PreTrainedModel) -> list[Any]:
    """The model and those in it that run the same decoder, as far as they take a cache."""
    return [each for each in _of_one_decoder(model) if cache_argument(each) is not None]


def generators(model: PreTrainedModel) -> list[Any]:
    """Those of them that generate, which may hand a cache on without naming it."""
    prepare = "_prepare_cache_for_generation"
    return [each for each in _of_one_decoder(model) if hasattr(each, prepare)]


def _of_one_decoder(model: PreTrainedModel) -> list[Any]:
    kind = type(text_config(model.config))
    models = [each for each in model.modules() if isinstance(each, PreTrainedModel)]
    return [each for each in models if type(text_config(each.config)) is kind]


def attention_configs(model: PreTrainedModel, paged: Iterable[nn.Module]) -> list[Any]:
    """The configurations that name the attention of the decoder, each once.

    paged: its attention modules. Encoders of pictures or sound have their own.
    """
    configs = [text_config(model.config)]
    configs += [each.config for each in decoders(model)]
    configs += [each.config for each in paged if hasattr(each, "config")]
    return list({id(each): each for each in configs}.values())


def _keep_from_compiling(module: Any, undo: list[Callable[[], None]]) -> None:
    """Let torch.compile run a forward as it is: what pages do at a step cannot be traced."""
    before = vars(module).get("forward")
    module.forward = ours = torch.compiler.disable(module.forward)

    def restore() -> None:
        if vars(module).get("forward") is not ours:
            return
        del module.forward
        if before is not None:
            module.forward = before

    undo.append(restore)


def _keep_from_copying(module: Any, undo: list[Callable[[], None]]) -> None:
    """Say so where somebody copies or pickles an attached model, whose hooks are another's."""

    def refuse(*_: Any) -> Any:
        raise ValueError(
            f"{type(module).__name__}: expected a model that is not attached to copy or pickle, "
            "got one that is; detach() it first (save_pretrained() and state_dict() work meanwhile)"
        )

    for name in ("__deepcopy__", "__reduce_ex__"):
        setattr(module, name, refuse)
        undo.append(partial(vars(module).pop, name, None))


def _behind_cache(input_ids: Tensor, kwargs: dict[str, Any]) -> dict[str, int]:
    """How many tokens of a whole prompt are new to the cache, in the words of ``generate``.

    With drafts (prompt lookup, an assistant) Transformers begins with all of them, whatever the
    cache holds.
    """
    cache, told = take_cache(dict(kwargs)), kwargs.get("attention_mask")
    # Some versions give no mask where it would be all ones.
    told = kwargs.get("position_ids") if told is None else told
    if cache is None or told is None or not kwargs.get("is_first_iteration"):
        return {}
    held, given = cache.get_seq_length(), input_ids.shape[1]
    # A mask longer than the tokens: only those that are new were given.
    if not held or told.shape[-1] != given:
        return {}
    if given <= held:
        raise ValueError(
            f"input_ids: expected the whole text, of more than the {held} tokens that the cache "
            f"holds, got {given}; crop({given - 1}) lets the last be computed again"
        )
    return {"next_sequence_length": given - held}


def _tokens(kwargs: dict[str, Any]) -> Tensor | None:
    """[rows, tokens] ids of a forward, or [rows, tokens, channels] in their place."""
    found = kwargs.get("input_ids")
    return kwargs.get("inputs_embeds") if found is None else found


def _keep_shared(output: Any) -> None:
    """Make dense what a forward hands out of its cache (Gemma 4, to an assistant of its own, which
    reads it after the next tokens have come and gone)."""
    shared = getattr(output, "shared_kv_states", None)
    if shared:
        output.shared_kv_states = {kind: tuple(map(kept, both)) for kind, both in shared.items()}


def _refuse_arguments(module: Any, kwargs: dict[str, Any]) -> None:
    """What attention over pages cannot give, and a mask that belongs to another batch."""
    wanted = kwargs.get("output_attentions")
    if wanted is None:
        # What a forward that is not told does.
        configs = (module.config, text_config(module.config))
        wanted = any(getattr(each, "output_attentions", False) for each in configs)
    if wanted:
        raise ValueError(
            "output_attentions: expected False while a model is attached: attention over pages "
            "makes no weights to show (use_cache=False lets the model's own attention run)"
        )
    if kwargs.get("encoder_hidden_states") is not None:
        raise ValueError(
            "encoder_hidden_states: expected None while a model is attached: its cross-attention "
            "would keep an encoder's keys among those of its tokens (use_cache=False lets the "
            "model's own attention run)"
        )
    mask, tokens = kwargs.get("attention_mask"), _tokens(kwargs)
    if isinstance(mask, Tensor) and isinstance(tokens, Tensor):
        if mask.ndim not in (2, 4):
            raise ValueError(
                "attention_mask: expected [rows, tokens], or [rows, 1 or heads, new tokens, all "
                f"tokens], got {tuple(mask.shape)}"
            )
        rows = (tokens.shape[0],) if mask.ndim == 2 else (1, tokens.shape[0])
        if mask.shape[0] not in rows:
            raise ValueError(
                f"attention_mask: expected {tokens.shape[0]} rows, as the tokens have, got "
                f"{mask.shape[0]}"
            )
