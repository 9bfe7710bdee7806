"""What the installed versions of other libraries do not allow; where the pinned ones do."""

import peft
import pytest
from packaging.version import Version
from transformers.integrations import peft as integration

NEEDED = getattr(integration, "MIN_PEFT_VERSION", "0")
# transformers 5.24 asks for PEFT 0.22, which is not released, where it loads or adds an adapter itself.
transformers_takes_peft = pytest.mark.skipif(
    Version(peft.__version__) < Version(NEEDED), reason=f"this transformers loads adapters with PEFT from {NEEDED} on"
)


def checkpoint_layers(model, *, reentrant=False):
    """Let a transformers model in PEFT's compute its layers again in the backward; its method has had two names."""
    base = model.base_model.model
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def free_layers(model):
    """Undo `checkpoint_layers`."""
    base = model.base_model.model
    (getattr(base, "activation_checkpointing_disable", None) or base.gradient_checkpointing_disable)()
