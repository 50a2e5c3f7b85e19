"""CodeGen: GPT-J's attention behind a projection packed for four cores."""

from __future__ import annotations

from edgeprompt.base.families.decoder import DecoderFamily
from edgeprompt.base.families.gptj import patch

FAMILIES = (DecoderFamily("codegen", patch=patch),)
