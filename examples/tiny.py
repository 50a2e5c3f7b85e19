"""Two small models for docs/worked-example.md, trained here from scratch in a minute or two each: no hub is needed.

    python examples/tiny.py bert work/tiny-bert     an encoder that fills masks
    python examples/tiny.py t5 work/tiny-t5         an encoder-decoder

They learn from product reviews, tweets and newspaper sentences (`make data`), and see no movie review: the BERT to fill
in "great" or "terrible" behind a sentence, and any other word of it; the T5 to answer "sentiment: ..." with "positive"
or "negative" and "source: ..." with where the sentence is from.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import WORK
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils.logging import disable_progress_bar

SETS = ("product", "tweets", "news")
VERDICTS = {"positive": " It was great.", "negative": " It was terrible."}
VERDICT = 3
"""Where its word stands, counted from the end: a full stop and </s> follow."""
PAD, EOS, MASK, CLS = range(4)
SPECIAL = ("<pad>", "</s>", "<mask>", "<cls>")
VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH = 4096, 128, 2, 4, 96
MASKED = 0.15
IGNORED = -100
BATCH, RATE = 32, 1e-3


def sentences() -> list[tuple[str, str, str]]:
    """(text, sentiment, source) of all training sentences but the movie reviews."""
    found = []
    for name in SETS:
        with (WORK / "data" / f"{name}.train.csv").open(encoding="utf-8", newline="") as file:
            found += [(row["text"], row["label"], name) for row in csv.DictReader(file)]
    return found


def make_tokenizer(texts: list[str], *, first: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `first`: the special token in front of a text, or ""."""
    tokenizer = ByteLevelBPETokenizer(lowercase=True)
    tokenizer.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A </s>".strip(), special_tokens=[("</s>", EOS), ("<cls>", CLS)]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "sep_token": "</s>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **names, cls_token=first or None)


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    """Rows as one tensor, `value` behind the shorter ones."""
    tensors = [torch.tensor(row[:LENGTH]) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def train(model: Any, next_loss: Callable[[], torch.Tensor], steps: int) -> None:
    """Adam, from `RATE` down along a line; `next_loss` is the loss on the next batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    model.train()
    for step in range(1, steps + 1):
        loss = next_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 200 == 0 or step == steps:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    model.eval()


def drawn(count: int, generator: torch.Generator) -> list[int]:
    """Indices of one batch."""
    return torch.randint(count, (BATCH,), generator=generator).tolist()


def bert(folder: Path, steps: int) -> None:
    """Train and save the encoder."""
    texts = [text + VERDICTS[sentiment] for text, sentiment, _ in sentences()]
    tokenizer = make_tokenizer(texts, first="<cls>")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=LENGTH + 32,
        pad_token_id=PAD,
    )
    encoded = tokenizer(texts)["input_ids"]

    model = BertForMaskedLM(config)
    generator = torch.Generator().manual_seed(0)

    def next_loss() -> torch.Tensor:
        rows = [encoded[index] for index in drawn(len(encoded), generator)]
        ids = padded([row[-LENGTH:] for row in rows], PAD)
        hidden = (torch.rand(ids.shape, generator=generator) < MASKED) & (ids > CLS)
        for row, one in zip(hidden, rows, strict=True):
            row[min(len(one), LENGTH) - VERDICT] = True
        states = model.bert(ids.masked_fill(hidden, MASK), attention_mask=(ids != PAD).long()).last_hidden_state
        # The output layer costs more than all others together; it sees the masks alone.
        return torch.nn.functional.cross_entropy(model.cls(states[hidden]), ids[hidden])

    save(model, tokenizer, next_loss, folder, steps)


def t5(folder: Path, steps: int) -> None:
    """Train and save the encoder-decoder."""
    pairs = [
        pair
        for text, sentiment, source in sentences()
        for pair in ((f"sentiment: {text}", sentiment), (f"source: {text}", source))
    ]
    tokenizer = make_tokenizer([f"{text} {answer}" for text, answer in pairs], first="")
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=4 * WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )
    texts, answers = (tokenizer(list(column))["input_ids"] for column in zip(*pairs, strict=True))

    model = T5ForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(0)

    def next_loss() -> torch.Tensor:
        chosen = drawn(len(pairs), generator)
        ids = padded([texts[index] for index in chosen], PAD)
        labels = padded([answers[index] for index in chosen], IGNORED)
        loss: torch.Tensor = model(input_ids=ids, attention_mask=(ids != PAD).long(), labels=labels).loss
        return loss

    save(model, tokenizer, next_loss, folder, steps)


def save(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    next_loss: Callable[[], torch.Tensor],
    folder: Path,
    steps: int,
) -> None:
    """Train, and write a transformers folder."""
    train(model, next_loss, steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {model.num_parameters() / 1e6:.1f} million parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("bert", "t5"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    disable_progress_bar()
    torch.manual_seed(0)
    {"bert": bert, "t5": t5}[options.kind](options.folder, options.steps)


if __name__ == "__main__":
    main()
