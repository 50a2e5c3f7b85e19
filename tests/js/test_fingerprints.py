"""Base fingerprints: the npm package says the same as Python of every pair."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

from edgeprompt.base.fingerprint import base_fingerprint
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
        signs, first = parse(found[0]).signs, parse(found[0]).first
        found += [f"sha256-2:{signs}.{first}", f"sha256:{first}", found[0][:-4], found[0] + ".", f"{found[0]}A"]
        pairs += itertools.product(found[:3] + found[-5:], found)
    answers = ask("fingerprints", pairs=pairs)
    expected = [differences(one, other) for one, other in pairs]
    assert [bool(one) for one in answers] == [bool(one) for one in expected]
    assert sum(map(bool, answers)) > 400
    assert sum(not one for one in answers) > 100
    for one, other in zip(answers, expected, strict=True):
        assert one is None or one.split(":")[0] == other[0].split(":")[0]


def _types() -> tuple[Any, ...]:
    import torch

    return torch.float16, torch.bfloat16
