from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from edgeprompt.decoding.detokenizer import Detokenizer


def decode_bytes(ids: Any) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def pieces(
    text: str, stop: tuple[str, ...] = (), decode: Callable[[Any], str] = decode_bytes
) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(decode, stop)
    found = []
    for byte in text.encode():
        found.append(detokenizer.add(byte))
        if detokenizer.stopped:
            break
    return [*found, detokenizer.finish()], detokenizer


@pytest.mark.parametrize("text", ["plain", "café", "日本語", "a😀b👩‍👩‍👧", ""])
def test_a_character_comes_with_its_last_byte(text: str) -> None:
    found, detokenizer = pieces(text)
    assert "".join(found) == text == detokenizer.text
    assert not any("�" in piece for piece in found)


def test_bytes_that_never_complete_come_at_the_end() -> None:
    detokenizer = Detokenizer(decode_bytes)
    assert [detokenizer.add(byte) for byte in b"a\xe6\x97"] == ["a", "", ""]
    assert detokenizer.finish() == "�"


def test_stop_string_across_tokens_is_never_given_out() -> None:
    found, detokenizer = pieces("one\nQ: two", ("\nQ:",))
    assert detokenizer.stopped
    assert "".join(found) == "one" == detokenizer.text


def test_half_a_stop_string_comes_once_it_cannot_become_one() -> None:
    found, detokenizer = pieces("a##b##", ("###",))
    assert not detokenizer.stopped
    assert found[:4] == ["a", "", "", "##b"]
    assert detokenizer.text == "a##b##"


def test_the_earliest_of_several_stops_wins() -> None:
    assert pieces("abcdef", ("ef", "cd", "zz"))[1].text == "ab"


def test_spaces_that_depend_on_neighbours_stay() -> None:
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "ly": 2}, unk_token="ly"))
    tokenizer.decoder = decoders.Metaspace()
    detokenizer = Detokenizer(tokenizer.decode)
    found = [detokenizer.add(token) for token in (0, 1, 2, 1)]
    assert found == ["one", " two", "ly", " two"]


def test_random_texts_and_stops_equal_a_plain_search() -> None:
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices("ab😀é\n", k=rng.randint(0, 12)))
        stop = tuple("".join(rng.choices("ab😀\n", k=rng.randint(1, 3))) for _ in range(rng.randint(0, 2)))
        found = pieces(text, stop)[1].text
        assert found in {text[: text.find(word)] for word in stop if word in text} or found == text
        assert not any(word in found for word in stop)
        assert (found == text) == (not any(word in text for word in stop))
