"""The lab's own kinds of adapters, registered with PEFT, so that its save, load and switch work on them.

PEFT's `register_peft_method` takes only members of its closed enumeration `PeftType`; a member is added to it here
first. Importing this module does it, once.
"""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

from lora_lab.adapters.bottleneck import BottleneckConfig, BottleneckModel
from lora_lab.adapters.ia3 import DtypeKeepingIA3Model
from lora_lab.adapters.lora_experts import LoraExpertsConfig, LoraExpertsModel
from lora_lab.adapters.mov import MovConfig, MovModel

# name -> (configuration, model): filled by the rows below.
_OWN: dict[str, tuple[type[Any], type[Any]]] = {
    "bottleneck": (BottleneckConfig, BottleneckModel),
    "mov": (MovConfig, MovModel),
    "lora_experts": (LoraExpertsConfig, LoraExpertsModel),
}


def add_peft_type(name: str) -> PeftType:
    """The member `name` (upper case) of PEFT's enumeration of methods, added to it where it is missing."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    PeftType._member_map_[name] = member
    PeftType._member_names_.append(name)
    PeftType._value2member_map_[name] = member
    # From Python 3.12 on members are attributes of the class, which the enumeration itself would refuse to set.
    type.__setattr__(PeftType, name, member)
    return member


def _register() -> None:
    for name, (config, model) in _OWN.items():
        if add_peft_type(name.upper()) not in PEFT_TYPE_TO_CONFIG_MAPPING:
            register_peft_method(name=name, config_cls=config, model_cls=model)
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.IA3] = DtypeKeepingIA3Model


_register()
