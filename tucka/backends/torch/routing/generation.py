"""What the routing scope has to know of language models: caches, encoders, and where a generation begins and ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from tucka.backends.torch.routing.forwards import ForwardHooks

__all__ = ["HeldGeneration", "decoder_path", "encoder_of", "is_causal", "is_filled", "key_value_cache"]

_CACHE_NAMES = ("past_key_values", "cache_params")


def key_value_cache(arguments: dict[str, Any], output: Any = None) -> Any:
    """Find the cache that a forward fills.

    Parameters
    ----------
    arguments : dict
        Its named arguments.
    output : object, optional
        What it returned; a tuple is searched for a cache.

    Returns
    -------
    object
        The cache, or None.

    Examples
    --------
    >>> key_value_cache({"past_key_values": "cache"})
    'cache'
    """
    for name in _CACHE_NAMES:
        found = getattr(output, name, None)
        found = arguments.get(name) if found is None else found
        if found is not None:
            return found
    if isinstance(output, tuple):
        return next((part for part in output if hasattr(part, "get_seq_length")), None)
    return None


def is_filled(cache: Any) -> bool:
    """Tell whether a cache holds tokens already.

    Parameters
    ----------
    cache : object
        The cache, or None.

    Returns
    -------
    bool
        False for None and for a cache that counts no tokens.

    Examples
    --------
    >>> is_filled(None)
    False
    """
    if cache is None:
        return False
    length = getattr(cache, "get_seq_length", None)
    # A compiler cannot branch on a count that may be a tensor.
    return length is None or torch.compiler.is_compiling() or int(length()) > 0


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def encoder_of(model: nn.Module) -> nn.Module | None:
    """Return the encoder of an encoder-decoder, which generation calls by itself.

    Parameters
    ----------
    model : Module
        Any model.

    Returns
    -------
    Module or None
        None for all other models.

    Examples
    --------
    >>> encoder_of(nn.Linear(2, 2)) is None
    True
    """
    get_encoder: Any = getattr(model, "get_encoder", None)
    encoder = get_encoder() if _is_encoder_decoder(model) and callable(get_encoder) else None
    return encoder if isinstance(encoder, nn.Module) and encoder is not model else None


def decoder_path(model: nn.Module) -> str | None:
    """Return the name of the decoder of an encoder-decoder inside of it.

    Parameters
    ----------
    model : Module
        Any model.

    Returns
    -------
    str or None
        None for all other models.

    Examples
    --------
    >>> decoder_path(nn.Linear(2, 2)) is None
    True
    """
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = get_decoder() if _is_encoder_decoder(model) and callable(get_decoder) else None
    return next((name for name, module in model.named_modules() if name and module is decoder), None)


def is_causal(model: nn.Module) -> bool:
    """Tell whether a model's labels continue its own input.

    Parameters
    ----------
    model : Module
        Any model.

    Returns
    -------
    bool
        False for encoder-decoders and for transformers without a generating head, whose labels are classes. True for
        a model of another kind: the shape of its labels decides.

    Examples
    --------
    >>> is_causal(nn.Linear(2, 2))
    True
    """
    if _is_encoder_decoder(model):
        return False
    can_generate: Any = getattr(model, "can_generate", None)
    return bool(can_generate()) if callable(can_generate) else True


class HeldGeneration:
    """The ``generate`` of an adapted model: its class's own, with one route from the prompt to the end.

    An object and not a function, since it lies on the model and is copied and pickled with it.

    Parameters
    ----------
    scope : ForwardHooks
        Holds the route.
    model : Module
        Whose generation it is.

    Examples
    --------
    >>> from tucka.backends.torch.routing.forwards import ForwardHooks
    >>> class Model(nn.Module):
    ...     def generate(self, text):
    ...         return text + "!"
    >>> model = Model()
    >>> HeldGeneration(ForwardHooks(), model)("hello")
    'hello!'
    """

    def __init__(self, scope: ForwardHooks, model: nn.Module) -> None:
        self.scope = scope
        self.model = model
        # Somebody else's, put there before.
        self.inner = vars(model).get("generate")

    @property
    def __wrapped__(self) -> Any:
        """For `inspect.signature`: what is called."""
        return type(self.model).generate.__get__(self.model) if self.inner is None else self.inner  # type: ignore[attr-defined]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate, with the arguments of the model's own method."""
        with self.scope.hold(kwargs.get("attention_mask")):
            return self.__wrapped__(*args, **kwargs)

    @classmethod
    def put_on(cls, model: nn.Module, scope: ForwardHooks) -> None:
        """Replace the ``generate`` of one model, if it has one.

        Parameters
        ----------
        model : Module
            The model.
        scope : ForwardHooks
            Its scope.
        """
        if callable(getattr(model, "generate", None)):
            vars(model)["generate"] = cls(scope, model)

    @classmethod
    def take_off(cls, model: nn.Module) -> None:
        """Put back what was there before.

        Parameters
        ----------
        model : Module
            The model.
        """
        held = vars(model).get("generate")
        if isinstance(held, cls):
            del vars(model)["generate"]
            if held.inner is not None:
                vars(model)["generate"] = held.inner
