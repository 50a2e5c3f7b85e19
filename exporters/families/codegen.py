"""CodeGen: GPT-J's attention behind a projection packed for four cores."""

from __future__ import annotations

from exporters.families.decoder import DecoderFamily
from exporters.families.gptj import patch

FAMILIES = (DecoderFamily("codegen", patch=patch),)
