"""Whether a base serves a converted prompt: told at conversion, not when the first request comes."""

from __future__ import annotations

from edgeprompt import names
from edgeprompt.errors import InputError, TemplateError, UnsupportedError
from edgeprompt.heads.layers import check_head_sizes
from edgeprompt.prompts.file import PromptFile
from edgeprompt.prompts.template import Mask
from edgeprompt.prompts.verbalizer import ids_alone, ids_behind, text_before_words
from exporters.importers.foreign import BaseFacts

_WORDS = "--verbalizer LABEL=WORD for each label"


def check_servable(prompt: PromptFile, base: BaseFacts) -> None:
    """Refuse a prompt that no package of `base` answers with, and say what to give.

    Raises:
        BaseMismatchError: its head's tensors do not fit each other, or the base's hidden size.
        UnsupportedError: the base has no such task.
        InputError: labels, words or the template's mask are missing, or the prompt is longer than the base's context.
        TemplateError: the template places another number of virtual tokens, label words cannot be told apart, or one
            mask stands for several tokens.
    """
    masks = sum(isinstance(part, Mask) for part in prompt.template.parts)
    limit = base.geometry.max_positions
    if limit and prompt.num_virtual_tokens >= limit:
        raise InputError(
            f"prompt {prompt.name!r} has {prompt.num_virtual_tokens} virtual tokens; base {base.base.name} reads "
            f"{limit} positions, text included"
        )
    if prompt.is_infix and base.architecture != names.DECODER_ONLY:
        raise UnsupportedError(f"prompt {prompt.name!r} has keys and values inside its text, which is for decoders")
    if prompt.prompt_embeddings is not None or prompt.is_infix:
        prompt.template.check_places(prompt.num_virtual_tokens)
    if prompt.head_spec is not None:
        check_head_sizes(prompt.name, prompt, base.geometry.hidden_size)
        return
    encoder = base.architecture == names.ENCODER_ONLY
    if prompt.task == "generate" and encoder:
        raise UnsupportedError(
            f"prompt {prompt.name!r} has no head, and base {base.base.name} is an encoder, which generates nothing: to "
            f"answer with a word at the mask give {_WORDS}, and --template with {{mask}} where the word stands, such "
            "as '{prompt}{text} It was {mask}.'"
        )
    if prompt.task in ("tag", "qa"):
        raise UnsupportedError(f"prompt {prompt.name!r} is for {prompt.task!r} and has no head")
    if masks and not encoder:
        raise InputError(
            f"template {str(prompt.template)!r} has {{mask}}, and base {base.base.name} is {base.architecture}: leave "
            "it out, the answer follows the text"
        )
    if prompt.task == "classify":
        _check_words(prompt, base, masks if encoder else None)


def _check_words(prompt: PromptFile, base: BaseFacts, masks: int | None) -> None:
    if len(prompt.verbalizer) < 2:
        raise InputError(
            f"prompt {prompt.name!r} has neither a head nor label words for two labels: give {_WORDS} (there: "
            f"{', '.join(prompt.verbalizer) or 'none'})"
        )
    if masks is not None and masks != 1:
        raise InputError(
            f"template {str(prompt.template)!r} has {masks} {{mask}}; label words of an encoder stand at one: give "
            "--template with {mask} where the word stands"
        )
    if base.tokenizer is None:
        return

    def encode(text: str) -> list[int]:
        return list(base.tokenizer.encode(text, add_special_tokens=False))

    seq2seq = base.architecture == names.ENCODER_DECODER  # whose words begin a text of their own
    before = text_before_words(prompt.template)
    owners: dict[tuple[int, ...], str] = {}
    for label, words in prompt.verbalizer.items():
        for word in words:
            ids = tuple(ids_alone(encode, word) if seq2seq or not word else ids_behind(encode, before, word))
            if not ids:
                raise TemplateError(f"label word {word!r} of label {label!r} has no tokens")
            if masks is not None and len(ids) > 1:
                raise TemplateError(f"label word {word!r} is {len(ids)} tokens; a mask stands for one")
            if owners.setdefault(ids, label) != label:
                raise TemplateError(f"labels {owners[ids]!r} and {label!r} share the label word {word!r}; change one")
