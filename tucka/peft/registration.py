"""How PEFT comes to know TuckA, and all else that depends on PEFT's private names."""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers as include_all_linear_layers
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

__all__ = ["add_peft_type", "include_all_linear_layers", "register"]


# PEFT accepts only methods that are members of its `PeftType` enum and has no plugin discovery. A plain string in its
# tables is not enough: transformers asks for ``peft_type.value``. So a real member is added at run time, through the
# same attributes that Python's own enum machinery fills.
def add_peft_type(name: str) -> Any:
    """Return the member `name`, in capitals, of PEFT's enum of methods; add it if PEFT does not have it."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    if hasattr(PeftType, "_hashable_values_"):  # Python 3.13
        PeftType._hashable_values_.append(name)
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Enter the method into PEFT's tables, once."""
    member = add_peft_type("TUCKA")
    if member not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name="tucka", config_cls=config_cls, model_cls=model_cls, prefix="tucka_")
