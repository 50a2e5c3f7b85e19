"""PEFT adapters with random parameters, one kind per method and task."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def peft_config(method: str, task_type: str) -> Any:
    import peft

    common = {"task_type": task_type, "num_virtual_tokens": 4}
    match method:
        case "prompt tuning":
            return peft.PromptTuningConfig(**common)
        case "P-tuning, MLP" | "P-tuning, LSTM":
            return peft.PromptEncoderConfig(
                **common, encoder_reparameterization_type=method[-4:].strip(), encoder_hidden_size=16
            )
        case "prefix tuning" | "prefix tuning, projected":
            return peft.PrefixTuningConfig(
                **common, prefix_projection=method.endswith("projected"), encoder_hidden_size=16
            )
        case "multitask prompt tuning":
            return peft.MultitaskPromptTuningConfig(**common, num_tasks=3, num_ranks=2)
        case "CPT":
            marks = [1, 2, 3, 4]
            return peft.CPTConfig(
                task_type=task_type, cpt_token_ids=[7, 8, 9, 10], cpt_mask=[1] * 4, cpt_tokens_type_mask=marks
            )
        case "Cartridge":
            return peft.CartridgeConfig(**common)
        case "trainable tokens":
            return peft.TrainableTokensConfig(token_indices=[3, 7, 12], task_type=task_type)
    raise ValueError(method)


def tuned(folder: Path, base: Path, auto: str, method: str, task_type: str, **options: Any) -> Any:
    """A PEFT adapter with random parameters, saved, and loaded again as a user would."""
    import peft
    import torch
    import transformers

    torch.manual_seed(1)
    kind = getattr(transformers, auto)
    model = peft.get_peft_model(kind.from_pretrained(base, **options), peft_config(method, task_type))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if "prompt" in name else 0.3))
    model.save_pretrained(folder)
    torch.manual_seed(1)
    return peft.PeftModel.from_pretrained(kind.from_pretrained(base, **options), folder).eval()


def take_base(model: Any, folder: Path) -> None:
    """Give a PEFT model the base's weights where transformers 5 loads none: LlamaForQuestionAnswering names its
    base otherwise than the checkpoint does."""
    inner = model.get_base_model()
    inner.transformer.load_state_dict(open_base(folder).state_dict())


def open_base(folder: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder)
