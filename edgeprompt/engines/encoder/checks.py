"""What a prompt must bring for an encoder's graph, checked when it is added."""

from __future__ import annotations

from collections.abc import Collection

from edgeprompt import names
from edgeprompt.engines.base import check_template, compile_words
from edgeprompt.errors import InputError, TemplateError, UnsupportedError
from edgeprompt.package.tokenizer import Tokenizer
from edgeprompt.prompts.registry import LoadedPrompt
from edgeprompt.prompts.template import Mask
from edgeprompt.prompts.verbalizer import Verbalizer, text_before_words

NO_GENERATION = "encoder-only bases do not generate; they classify, tag, answer questions and embed"


def check_placement(prompt: LoadedPrompt, inputs: Collection[str]) -> None:
    """Refuse a prompt whose tensors have no place in the graph, or whose virtual tokens have none in its template.

    Args:
        prompt: what is added.
        inputs: names of the graph's.

    Raises:
        UnsupportedError: an encoder-decoder's prompt, a generating one, or a deep one on a graph without prefixes.
        TemplateError: no `{prompt}` for the virtual tokens.
    """
    if prompt.has_encoder_prefix:
        raise UnsupportedError(
            f"prompt {prompt.name!r} has encoder_past_key_values, which belong to encoder-decoders; "
            "an encoder-only base takes past_key_values"
        )
    if prompt.past_length and names.past(0, "key") not in inputs:
        raise UnsupportedError(
            f"prompt {prompt.name!r} has past_key_values, and this graph, which another tool exported, has no such "
            "input; export the base with --route torch"
        )
    if prompt.file.task == "generate":
        raise UnsupportedError(f"prompt {prompt.name!r} is for generation. {NO_GENERATION}")
    check_template(prompt)


def compile_cloze(prompt: LoadedPrompt, base: str, outputs: Collection[str], tokenizer: Tokenizer) -> Verbalizer:
    """Label words for the mask of a masked language model.

    Raises:
        InputError: the prompt has no label words.
        UnsupportedError: the base is no masked language model.
        TemplateError: not exactly one `{mask}`, or a word of several tokens.
    """
    name, file = prompt.name, prompt.file
    if not file.verbalizer:
        raise InputError(f"prompt {name!r} has neither a head nor a verbalizer, so it cannot classify")
    if names.LOGITS not in outputs:
        raise UnsupportedError(
            f"prompt {name!r} classifies by label words, and {base} is no masked language "
            "model; tune it with a head, or export the ...ForMaskedLM checkpoint"
        )
    masks = sum(isinstance(part, Mask) for part in file.template.parts)
    if masks != 1:
        raise TemplateError(f"prompt {name!r}: label words need one {{mask}} in the template, found {masks}")
    found = compile_words(prompt, tokenizer, text_before_words(file.template))
    long = next((word for word in found.words if len(word) > 1), None)
    if long is not None:
        raise TemplateError(
            f"prompt {name!r}: label word {tokenizer.decode(long)!r} is {len(long)} tokens; a mask stands "
            "for one, so choose words of one token (a leading space may matter)"
        )
    return found
