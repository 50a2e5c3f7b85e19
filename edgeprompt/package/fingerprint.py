"""What a base fingerprint says, and whether two are of one base. `edgeprompt.base.fingerprint` computes them.

Format 3 is `sha256-3:SIGNS.FIRST.FACTS.SKETCH`: the hash of all signs (format 2), 16 digits of format 1, the facts of
the config that change what a base computes (base64url of JSON), and magnitudes of every parameter (base64url of bytes).
js/src/fingerprint.ts reads and compares the same way.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeprompt.package import strict_json

FORMAT_2 = "sha256-2:"
"""What fingerprints of format 2 start with."""
FORMAT_3 = "sha256-3:"
"""What fingerprints of format 3 start with."""

PROJECTIONS = 4
"""Signed sums over a parameter's values that a sketch holds."""
NORM_STEPS = 1024
"""Steps of a sketch's size for a doubling; its zero is 2^-32."""
PROJECTION_STEPS = 4096
"""Steps of a sketch's sum for one standard deviation."""
ENTRY = [("kind", "u1"), ("norm", "<u2"), ("sums", "<i2", (PROJECTIONS,))]
"""One parameter of a sketch: the finest type that its values need (`BFLOAT16`, ...), its size, and its sums."""
BFLOAT16, FLOAT16, FLOAT32 = 0, 1, 2
KNOWN = "known_values"
"""Key of the facts of a base whose file tells some of its config alone (GGUF): name -> value of all that it tells."""
MASKED_HEAD = "masked_head"
"""Key of the facts for the head of a masked language model; two bases are compared by it where both have one."""
MASKED_SIZES = "masked_head_sizes"
"""Key of the facts for the sizes and sums of that head: base64url of `ENTRY`s, in the order of their signs' hashes."""
LOGITS_BIAS = "final_logits_bias"
"""Key of the facts of a base that has such a bias: whether it is not zero."""
SWITCHED_OFF = "switched_off"
"""Key of the facts for the names of config values that are false or null where their class has another default."""
OPTIONAL = (MASKED_HEAD, MASKED_SIZES, LOGITS_BIAS, SWITCHED_OFF)
"""Facts that are compared where both bases have them: heads may be left out, and older fingerprints lack some."""
_NAMES_BYTES = 8
OTHER = "their sizes or embeddings differ"
"""What `differences` says of two bases that have nothing in common."""

# A value that was rounded to float16 and then to bfloat16 may differ by a step from one that was rounded at once. Over
# a parameter that was measured as 0.0016 of its size; the bounds are far outside of that and far below training.
_ONE = 0.008 * PROJECTION_STEPS
"""Most root mean square of the differences of a parameter's sums where such rounding may lie between two bases."""
_ALL = 0.0025 * PROJECTION_STEPS
"""The same over all parameters."""
_NORM = 12
"""Most steps between sizes then: one step of bfloat16."""
_TINY = 2.0**-25
"""What float16 rounds the smallest values by, at most."""


@dataclass(frozen=True)
class Fingerprint:
    """The parts of a fingerprint; those that its format lacks are empty."""

    first: str
    """Format 1: geometry and sampled rows of the embedding."""
    signs: str = ""
    """Format 2: the signs of all matrices and biases."""
    facts: Mapping[str, Any] | None = None
    """Config values that are not their class's defaults."""
    known: Mapping[str, Any] | None = None
    """Config values that the base's file tells, by dotted names; None where it tells all."""
    names: bytes = b""
    """Hash of the names of the parameters in the sketch."""
    sketch: Any = field(default=None, repr=False)
    """An array of `ENTRY`, in the order of the names."""


@functools.lru_cache(maxsize=64)
def parse(fingerprint: str) -> Fingerprint:
    """Read a fingerprint of any format; one of no known format is compared as a whole."""
    if fingerprint.startswith(FORMAT_3):
        try:
            signs, first, facts, sketch = fingerprint.removeprefix(FORMAT_3).split(".")
            read, data = strict_json.loads(_decode(facts)), _decode(sketch)
            known = read.pop(KNOWN, None) if isinstance(read, dict) else read
            if not isinstance(read, dict) or not (known is None or isinstance(known, dict)):
                raise ValueError("the facts are no object")
            import numpy as np  # here: what loads a package waits for nothing heavy

            entries = np.frombuffer(data[_NAMES_BYTES:], ENTRY)
            return Fingerprint(first, signs, read, known, data[:_NAMES_BYTES], entries)
        except (ValueError, RecursionError):
            return Fingerprint(fingerprint)
    if fingerprint.startswith(FORMAT_2):
        signs, _, first = fingerprint.removeprefix(FORMAT_2).partition(".")
        return Fingerprint(first, signs)
    kind, _, digits = fingerprint.partition(":")
    return Fingerprint(digits[:16] if kind == "sha256" else fingerprint)


def rank(fingerprint: str) -> tuple[int, bool]:
    """How much a fingerprint covers: the number of its format, and whether it has the whole config."""
    found = parse(fingerprint)
    return (1 if not found.signs else 2 if found.facts is None else 3), found.known is None


def build(first: str, signs: str, facts: Mapping[str, Any], names: bytes, entries: Any) -> str:
    """A fingerprint of format 3 from its parts.

    Args:
        first: Of format 1, whole.
        signs: 64 hexadecimal digits of format 2.
        facts: Values of the config, JSON.
        names: What to hash of the parameters' names.
        entries: An array of `ENTRY`.
    """
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    data = hashlib.sha256(names).digest()[:_NAMES_BYTES] + entries.tobytes()
    return f"{FORMAT_3}{signs}.{parse(first).first}.{_encode(text.encode())}.{_encode(data)}"


def brief(fingerprint: str) -> str:
    """A fingerprint as people read it: format 3 has thousands of characters, of which a hash takes the place."""
    if not fingerprint.startswith(FORMAT_3):
        return fingerprint
    rest = fingerprint.removeprefix(FORMAT_3)
    return f"{FORMAT_3}{rest[:16]}-{hashlib.sha256(rest.encode()).hexdigest()[:8]}"


def differences(one: str, other: str) -> list[str]:
    """Why two fingerprints are not of one base, in words; empty where they are, as far as both say."""
    if one == other:
        return []
    a, b = parse(one), parse(other)
    if a.first != b.first:
        return [OTHER]
    if not a.signs or not b.signs:
        return []
    if a.signs != b.signs:
        return ["their embeddings are the same, so one of both was fine-tuned or merged"]
    if a.facts is None or b.facts is None:
        return []
    facts = _facts_apart(a, b)[0]
    if facts:
        return [f"their configs differ: {', '.join(facts)}"]
    if a.names == b.names and (far := _far(a.sketch, b.sketch)):
        return [
            f"signs are the same, the values of {far} parameters are not: one of both was scaled or trained (norms, "
            "IA3), or matrices changed places"
        ]
    return []


def weaker(one: str, other: str) -> str | None:
    """What the comparison of two fingerprints does not cover, None where it covers all."""
    a, b = parse(one), parse(other)
    if not a.signs or not b.signs:
        return "is of format 1, which covers its embedding alone: a fine-tuned or merged base would not be noticed"
    if a.facts is None or b.facts is None:
        return (
            "is of format 2, which covers the signs of its matrices and biases: other norms, scaled or exchanged "
            "matrices and another config would not be noticed"
        )
    if a.names != b.names:
        return (
            "has other names for its parameters (of another version of transformers), so only signs and config are "
            "compared: other norms, and scaled or exchanged matrices, would not be noticed"
        )
    if unknown := _facts_apart(a, b)[1]:
        return f"is of a GGUF file that does not tell {', '.join(unknown)}: these are not compared"
    return None


def _facts_apart(one: Fingerprint, other: Fingerprint) -> tuple[list[str], list[str]]:
    """Values of the configs that differ, and those that differ where one of both bases does not tell them."""
    a, b = dict(flat(one.facts or {})), dict(flat(other.facts or {}))
    off = [side.pop(SWITCHED_OFF, None) for side in (a, b)]
    if all(isinstance(names, list) for names in off):  # older fingerprints do not say what is off
        for side, names in zip((a, b), off, strict=True):
            side.update({str(name): False for name in names})
    differ, unknown = [], []
    for name in sorted(a.keys() | b.keys()):
        # Facts leave defaults out, but some values of an object may be defaults: what is known has them.
        x, y = (mine.get(name, (side.known or {}).get(name)) for mine, side in ((a, one), (b, other)))
        if x == y or (name in OPTIONAL and None in (x, y)):
            continue
        if name == MASKED_SIZES:
            if _sizes_apart(x, y):
                differ.append(name)
            continue
        if any(side.known is not None and name not in side.known for side in (one, other)):
            unknown.append(f"{name} ({_shown(a.get(name))} against {_shown(b.get(name))})")
        else:
            differ.append(f"{name} {_shown(x)} against {_shown(y)}")
    return differ, unknown


def flat(facts: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of facts within facts; a rotary type "default" is none."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{name}.")
        elif value is not None and (name, value) != ("rope_type", "default"):
            yield f"{above}{name}", value


def packed_sizes(entries: Any) -> str:
    """The value of `MASKED_SIZES`."""
    return _encode(entries.tobytes())


def _sizes_apart(one: object, other: object) -> bool:
    import numpy as np

    try:
        return bool(_far(*(np.frombuffer(_decode(str(text)), ENTRY) for text in (one, other))))
    except ValueError:  # of no fingerprint that was computed
        return True


def _far(one: Any, other: Any) -> int:
    """How many parameters are farther from each other than the types of both bases explain."""
    import numpy as np

    if len(one) != len(other):
        return max(len(one), len(other))
    steps = one["sums"].astype(np.float64) - other["sums"]
    apart = np.sqrt((steps**2).mean(axis=1))
    sizes = np.abs(one["norm"].astype(np.int64) - other["norm"])
    exact = (one["kind"] == other["kind"]) & (one["kind"] != BFLOAT16)
    # float16 has fewer digits for the smallest values
    scale = 2.0 ** (np.minimum(one["norm"], other["norm"]) / NORM_STEPS - 32)
    small = np.minimum(_TINY / scale, 1.0)
    far = np.where(
        exact,
        (np.abs(steps).max(axis=1) > 1) | (sizes > 1),
        (apart > _ONE + 3 * small * PROJECTION_STEPS) | (sizes > _NORM + 3 * small * NORM_STEPS),
    )
    far |= (one["norm"] == 0) != (other["norm"] == 0)
    count = int(far.sum())
    usual = small < 0.0005
    if not count and usual.any() and float(np.sqrt((apart[usual] ** 2).mean())) > _ALL:
        return int((apart > _ALL).sum())
    return count


def _shown(value: Any) -> str:
    return "(default)" if value is None else json.dumps(value, sort_keys=True)


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decode(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
