"""The parts of a model that have routes of their own: its body, its towers, and the bridges between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["Anatomy", "Part", "is_causal", "is_decoder_only"]


@dataclass(frozen=True)
class Part:
    """What a call belongs to."""

    name: str | None  # the path of a tower or bridge, "" for the body of the model; None stands for every part
    role: str = ""  # "encoder" or "decoder" of an encoder-decoder


def _is_model(module: Any) -> bool:
    """Tell whether a module is a model of transformers, which may be called by itself."""
    return hasattr(module, "main_input_name") and hasattr(module, "config")


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def is_decoder_only(model: nn.Module) -> bool:
    """Tell whether a model of transformers continues its own input."""
    can_generate: Any = getattr(model, "can_generate", None)
    return callable(can_generate) and bool(can_generate()) and not _is_encoder_decoder(model)


def _is_autoencoder(model: nn.Module) -> bool:
    """Tell whether a model of diffusers has two halves that are called one by one, as `encode` and `decode`."""
    is_of_diffusers = any(kind.__module__.startswith("diffusers.") for kind in type(model).__mro__)
    return is_of_diffusers and callable(getattr(model, "encode", None)) and callable(getattr(model, "decode", None))


def is_causal(model: nn.Module) -> bool:
    """Tell whether a model's labels continue its own input; of a model that is no transformers model, assume it."""
    if _is_encoder_decoder(model):
        return False
    return is_decoder_only(model) if callable(getattr(model, "can_generate", None)) else True


def _inner_configs(config: Any) -> Iterator[Any]:
    for name in getattr(config, "sub_configs", None) or ():
        inner = getattr(config, name, None)
        if inner is not None and inner is not config:
            yield inner
            yield from _inner_configs(inner)


def _is_inside(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


class Anatomy:
    """Where in a model its layers are: found once, from its configuration and the classes of its modules."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.paths = {id(module): path for path, module in root.named_modules()}
        self.is_autoencoder = _is_autoencoder(root)
        self.halves = self._find_halves()
        self.text = self._text_config()
        self.towers = self._find_towers()
        head: Any = getattr(root, "get_output_embeddings", None)
        self.head = head() if callable(head) else None

    def _find_halves(self) -> dict[str, str]:
        """Return the paths of encoder and decoder by their roles, in an encoder-decoder."""
        found = {}
        for role in ("encoder", "decoder") if _is_encoder_decoder(self.root) else ():
            get: Any = getattr(self.root, f"get_{role}", None)
            half = get() if callable(get) else None
            path = self.paths.get(id(half), "")
            if path:
                found[role] = path
        return found

    def _text_config(self) -> Any:
        config: Any = getattr(self.root, "config", None)
        if not hasattr(config, "get_text_config"):
            return config
        try:
            return config.get_text_config()
        except ValueError:  # of an encoder and of a decoder
            return config.get_text_config(decoder=True)

    def _find_towers(self) -> list[str]:
        """Return the outermost modules that have a configuration inside of the model's, but for its text body."""
        if self.is_autoencoder:
            return [half for half in ("encoder", "decoder") if half in self.paths.values()]
        inner = {id(found) for found in _inner_configs(getattr(self.root, "config", None))}
        towers: list[str] = []
        for path, module in self.root.named_modules() if inner else ():
            own = getattr(module, "config", None)
            in_half = any(_is_inside(path, half) for half in self.halves.values())
            if id(own) not in inner or own is self.text or in_half or not path:
                continue
            around = [tower for tower in towers if _is_inside(path, tower)]
            outer = self.root.get_submodule(around[-1]) if around else None
            if outer is None or (getattr(outer, "config", None) is not own and _is_model(module)):
                towers.append(path)
        return towers

    def part_of(self, path: str) -> str:
        """Return the name of the part that a layer belongs to."""
        inside = [tower for tower in self.towers if _is_inside(path, tower)]
        if inside:
            return max(inside, key=len)
        has_bridges = self.is_autoencoder or _is_model(self.root)
        return self._bridge_of(path) if self.towers and has_bridges else ""

    def _bridge_of(self, path: str) -> str:
        """Find the module between towers, such as a projector, around a layer; "" for the text body and its head."""
        names = path.split(".")
        module: Any = self.root
        for end in range(1, len(names) + 1):
            inner = ".".join(names[:end])
            module = getattr(module, names[end - 1])
            is_head = self.head is not None and (
                module is self.head or getattr(module, "base_layer", None) is self.head
            )
            if is_head or self._is_text(module) or inner in self.halves.values():
                return ""
            if isinstance(module, (nn.ModuleList, nn.ModuleDict)):  # which is never called
                return self._around(".".join(names[: end - 1]))
            if not _is_model(module):
                return inner
        return path

    def _around(self, path: str) -> str:
        """Return a module between towers, or "" where it has towers or the text body inside."""
        is_mixed = any(_is_inside(tower, path) for tower in self.towers) or any(
            map(self._is_text, self.root.get_submodule(path).modules())
        )
        return "" if is_mixed else path

    def _is_text(self, module: nn.Module) -> bool:
        return self.text is not None and getattr(module, "config", None) is self.text

    def role_of(self, path: str) -> str:
        """Say which half of an encoder-decoder a layer is in; "" in other models and outside of both."""
        return next((role for role, half in self.halves.items() if path.startswith(f"{half}.")), "")

    def calls(self, parts: Iterable[str]) -> Iterator[tuple[nn.Module, Part]]:
        """Go through the modules whose calls are recorded: the model, its parts, and the models inside of both."""
        named = [part for part in parts if part]
        roles = {path: role for role, path in self.halves.items()}
        for path, module in self.root.named_modules():
            part = max((name for name in named if _is_inside(path, name)), key=len, default="")
            if not part and any(_is_inside(path, tower) for tower in self.towers):
                continue  # a tower without adapted layers
            role = roles.get(path, "")
            if module is self.root or path == part or _is_model(module) or role:
                yield module, Part(part, role)
