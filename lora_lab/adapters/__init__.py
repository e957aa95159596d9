"""Adapters on a model.

PEFT first: once it is loaded, `peft_types` registers the lab's own kinds, which are modules of this package. Were one
of them the first to import PEFT, it would be asked for its classes before it has them.
"""

import peft  # noqa: F401
