"""Base fingerprints: the npm package says the same as Python of every pair."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

from edgeprompt.base.fingerprint import base_fingerprint, note_known
from edgeprompt.package.fingerprint import differences, parse
from tests.support import base_changes
from tests.support.damaged import bases


def test_every_pair_is_judged_alike(ask: Callable[..., Any]) -> None:
    pairs = [("sha256:ab", "sha256:ab"), ("x", "y"), ("sha256-3:a.b", "sha256-3:a.c"), ("sha256-2:ab", "sha256-2:ac")]
    for kind in base_changes.KINDS:
        model = bases.model(kind)
        found = [base_fingerprint(model), *(base_fingerprint(copy.deepcopy(model).to(t)) for t in _types())]
        found += [
            base_fingerprint(base_changes.changed(model, what, kind)) for what, k in base_changes.CASES if k == kind
        ]
        # What differs alone: a value that is off where its class's default is on.
        found.append(base_fingerprint(_switched_off(model, kind)))
        signs, first = parse(found[0]).signs, parse(found[0]).first
        if kind in base_changes.EPSILON_KINDS:
            found += [base_fingerprint(_of_gguf(model, epsilon)) for epsilon in (None, 1e-3)]
        found += [f"sha256-2:{signs}.{first}", f"sha256:{first}", found[0][:-4], found[0] + ".", f"{found[0]}A"]
        pairs += itertools.product(found[:3] + found[-5:], found)
    answers = ask("fingerprints", pairs=pairs)
    expected = [differences(one, other) for one, other in pairs]
    assert [bool(one) for one in answers] == [bool(one) for one in expected]
    assert sum(map(bool, answers)) > 400
    assert sum(not one for one in answers) > 100
    for one, other in zip(answers, expected, strict=True):
        assert one is None or one.split(":")[0] == other[0].split(":")[0]


def _of_gguf(model: Any, epsilon: float | None) -> Any:
    """A copy whose file tells the epsilon of its norms alone."""
    other = copy.deepcopy(model)
    name = next(name for name in base_changes.EPSILON if hasattr(other.config, name))
    if epsilon is not None:
        setattr(other.config, name, epsilon)
    note_known(other, [name])
    return other


def _switched_off(model: Any, kind: str) -> Any:
    """A copy whose config has a value that is false, not the default."""
    other = copy.deepcopy(model)
    usual = type(other.config)().to_dict()
    name = {"gpt2": "scale_attn_weights", "t5": "scale_decoder_outputs"}.get(kind)
    if name is not None:
        assert usual[name] is True
        setattr(other.config, name, False)
    return other


def _types() -> tuple[Any, ...]:
    import torch

    return torch.float16, torch.bfloat16
