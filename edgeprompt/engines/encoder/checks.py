"""What a prompt must bring for an encoder's graph, checked when it is added."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from edgeprompt import names
from edgeprompt.errors import BaseMismatchError, InputError, TemplateError, UnsupportedError
from edgeprompt.heads.layers import apply_head
from edgeprompt.package.manifest import Manifest
from edgeprompt.package.tokenizer import Tokenizer
from edgeprompt.prompts.file import PromptFile
from edgeprompt.prompts.source import PromptSource
from edgeprompt.prompts.template import Mask, VirtualTokens
from edgeprompt.prompts.verbalizer import Verbalizer, text_before_words

NO_GENERATION = "encoder-only bases do not generate; they classify, tag, answer questions and embed"


@dataclass(frozen=True)
class GraphFacts:
    """A package's graph: its manifest, and the names that it has."""

    manifest: Manifest
    inputs: Collection[str]
    outputs: Collection[str]


def check_placement(name: str, source: PromptSource, graph: GraphFacts) -> None:
    """Refuse a prompt whose tensors have no place in the graph, or whose virtual tokens have none in its template.

    Raises:
        UnsupportedError: an encoder-decoder's prompt, a generating one, or a deep one on a graph without prefixes.
        TemplateError: no `{prompt}` for the virtual tokens.
    """
    prompt = source.prompt
    if source.has_encoder_prefix:
        raise UnsupportedError(
            f"prompt {name!r} has encoder_past_key_values, which belong to encoder-decoders; "
            "an encoder-only base takes past_key_values"
        )
    if source.has_past and names.past(0, "key") not in graph.inputs:
        raise UnsupportedError(
            f"prompt {name!r} has past_key_values, and this graph, which another tool exported, has no such input; "
            "export the base with --route torch"
        )
    if prompt.task == "generate":
        raise UnsupportedError(f"prompt {name!r} is for generation. {NO_GENERATION}")
    inside = source.num_virtual_tokens if not source.has_past else 0
    if inside and not any(isinstance(part, VirtualTokens) for part in prompt.template.parts):
        raise TemplateError(
            f"prompt {name!r} has {inside} virtual tokens, and its template {str(prompt.template)!r} no {{prompt}}"
        )


def check_head(name: str, prompt: PromptFile, graph: GraphFacts) -> None:
    """Refuse a head that does not fit the graph, the task or the labels.

    Raises:
        BaseMismatchError: the head reads what the base lacks, or does not fit its hidden size.
        InputError: it does not fit the prompt's task or labels.
    """
    head = prompt.head_spec
    assert head is not None
    if head.input == "pooler" and names.POOLER_OUTPUT not in graph.outputs:
        raise BaseMismatchError(
            f"prompt {name!r} reads the pooled vector, and {graph.manifest.base.name} has no trained pooler"
        )
    by_token = head.input.startswith("tokens")
    if by_token != (prompt.task in ("tag", "qa")):
        raise InputError(f"prompt {name!r} is for {prompt.task!r}, and its head reads {head.input!r}")
    try:
        shape = apply_head(head, prompt.head, np.zeros((1, graph.manifest.geometry.hidden_size), np.float32)).shape
    except ValueError as error:
        raise BaseMismatchError(
            f"the head of prompt {name!r} does not fit hidden size {graph.manifest.geometry.hidden_size}: {error}"
        ) from error
    wanted = 2 if prompt.task == "qa" else len(prompt.labels)
    if wanted and shape[1] != wanted:
        raise InputError(f"the head of prompt {name!r} gives {shape[1]} scores for {wanted} labels")


def compile_cloze(name: str, prompt: PromptFile, graph: GraphFacts, tokenizer: Tokenizer) -> Verbalizer:
    """Label words for the mask of a masked language model.

    Raises:
        InputError: the prompt has no label words.
        UnsupportedError: the base is no masked language model.
        TemplateError: not exactly one `{mask}`, or a word of several tokens.
    """
    if not prompt.verbalizer:
        raise InputError(f"prompt {name!r} has neither a head nor a verbalizer, so it cannot classify")
    if names.LOGITS not in graph.outputs:
        raise UnsupportedError(
            f"prompt {name!r} classifies by label words, and {graph.manifest.base.name} is no masked language "
            "model; tune it with a head, or export the ...ForMaskedLM checkpoint"
        )
    masks = sum(isinstance(part, Mask) for part in prompt.template.parts)
    if masks != 1:
        raise TemplateError(f"prompt {name!r}: label words need one {{mask}} in the template, found {masks}")
    found = Verbalizer.compile(
        prompt.verbalizer,
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        prompt.calibration,
        prompt.verbalizer_aggregation,
        text_before_words(prompt.template),
    )
    long = next((word for word in found.words if len(word) > 1), None)
    if long is not None:
        raise TemplateError(
            f"prompt {name!r}: label word {tokenizer.decode(long)!r} is {len(long)} tokens; a mask stands "
            "for one, so choose words of one token (a leading space may matter)"
        )
    return found
