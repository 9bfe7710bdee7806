"""What the installed versions of other libraries do not allow; where the pinned ones do."""

import peft
import pytest
from packaging.version import Version
from transformers.integrations import peft as integration

NEEDED = getattr(integration, "MIN_PEFT_VERSION", "0")
# transformers 5.24 asks for PEFT 0.22, which is not released.
transformers_takes_peft = pytest.mark.skipif(
    Version(peft.__version__) < Version(NEEDED), reason=f"this transformers loads adapters with PEFT from {NEEDED} on"
)
