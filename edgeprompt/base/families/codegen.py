"""CodeGen: GPT-J's attention behind a projection packed for four cores."""

from __future__ import annotations

from edgeprompt.base.families.decoder import DecoderFamily, replacing
from edgeprompt.base.families.gptj import attention_on_heads

FAMILIES = (DecoderFamily("codegen", patch=replacing("CodeGenAttention", "_attn", attention_on_heads)),)
