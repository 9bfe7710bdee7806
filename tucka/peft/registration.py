"""Make PEFT know TuckA from outside: the one place that depends on how PEFT's enum of methods is made.

PEFT accepts only methods that are members of its `PeftType` enum and has no plugin discovery. A plain string in its
tables works half way: transformers asks for ``peft_type.value``. So a real member is added at run time, through the
same attributes that Python's own enum machinery fills. If PEFT one day has a member of this name, that one is used.
"""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

__all__ = ["add_peft_type", "register"]


def add_peft_type(name: str) -> Any:
    """Return the member `name` of PEFT's enum of methods, which is added if it is not there.

    Parameters
    ----------
    name : str
        In capitals; also the member's value.

    Returns
    -------
    PeftType
        The member.

    Examples
    --------
    >>> add_peft_type("TUCKA").value
    'TUCKA'
    """
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
    """Enter the method into PEFT's tables, once.

    Parameters
    ----------
    config_cls : type
        The configuration class.
    model_cls : type
        The tuner class.

    Examples
    --------
    >>> from tucka.peft import TuckAConfig
    >>> "TUCKA" in PEFT_TYPE_TO_CONFIG_MAPPING
    True
    """
    member = add_peft_type("TUCKA")
    if member not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name="tucka", config_cls=config_cls, model_cls=model_cls, prefix="tucka_")
