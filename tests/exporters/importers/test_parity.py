"""Every foreign format x base x method: what edgeprompt serves against what the foreign tool computes.

PEFT runs live; OpenPrompt's and P-Tuning v2's results were recorded with their real code (tests/golden/foreign). The
last test writes the differences as a table and compares it with docs/parity-formats.md; EDGEPROMPT_WRITE_DOCS=1 writes
that file.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeprompt import Request, load_prompt
from edgeprompt.errors import UnsupportedError
from exporters import convert_prompt
from tests.exporters.importers.comparison import IDS, difference, token_scores
from tests.exporters.importers.peft_adapters import open_base, take_base, tuned

ROOT = Path(__file__).resolve().parents[3]
DOC = ROOT / "docs/parity-formats.md"
TOLERANCE = 1e-4
MEASURED: dict[tuple[str, str, str], float] = {}

DECODER_METHODS = (
    "prompt tuning",
    "P-tuning, MLP",
    "P-tuning, LSTM",
    "prefix tuning",
    "prefix tuning, projected",
    "multitask prompt tuning",
    "CPT",
    "Cartridge",
    "trainable tokens",
)
HEAD_CASES = [
    (base, kind, method)
    for base, kind in (
        ("pooled-bert", "SEQ_CLS"),
        ("pooled-bert", "TOKEN_CLS"),
        ("pooled-bert", "QUESTION_ANS"),
        ("roberta", "SEQ_CLS"),
        ("roberta", "TOKEN_CLS"),
        ("llama", "SEQ_CLS"),
        ("llama", "TOKEN_CLS"),
        ("llama", "QUESTION_ANS"),
        ("gpt2", "SEQ_CLS"),
        ("gpt2", "TOKEN_CLS"),
        ("gpt2", "QUESTION_ANS"),
        ("t5", "TOKEN_CLS"),
    )
    for method in ("prompt tuning", "prefix tuning")
    if (base, method) != ("t5", "prefix tuning")  # see test_peft_limits.py
]
OPENPROMPT = [
    "openprompt-soft-gpt2",
    "openprompt-soft-bert",
    "openprompt-soft-t5",
    "openprompt-mixed-gpt2",
    "openprompt-mixed-bert",
    "openprompt-ptuning-lstm-gpt2",
    "openprompt-ptuning-mlp-t5",
    "openprompt-prefix-gpt2",
    "openprompt-prefix-t5",
    "openprompt-softverbalizer-mixed-gpt2",
    "openprompt-softverbalizer-prefix-gpt2",
]
P_TUNING_V2 = [
    "p-tuning-v2-bert",
    "p-tuning-v2-projected-bert",
    "p-tuning-v2-roberta",
    "p-tuning-v2-tagging-bert",
    "p-tuning-v2-qa-bert",
]


def record(tool: str, base: str, method: str, differences: list[float]) -> None:
    worst = max(differences)
    MEASURED[tool, base, method] = worst
    assert worst <= TOLERANCE, f"{tool} {base} {method}: differs by {worst}"


@pytest.mark.parametrize("method", DECODER_METHODS)
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_peft_on_decoders(
    base: str, method: str, bases: dict[str, Path], package: Any, runtime: Any, tmp_path: Path
) -> None:
    import torch

    model = tuned(tmp_path / "adapter", bases[base], "AutoModelForCausalLM", method, "CAUSAL_LM")
    multitask = method.startswith("multitask")
    file = tmp_path / "prompt.safetensors"
    convert_prompt(
        tmp_path / "adapter", file, base=package(base), task_index=2 if multitask else None, name=f"{base} {method}"
    )
    served = runtime(base)
    name = served.add_prompt(file)
    tokens = (3, 7, 12) if method == "trainable tokens" else ()
    extra = {"task_ids": torch.tensor([2])} if multitask else {}
    if method == "CPT":
        extra["labels"] = None
    differences = []
    for ids in IDS:
        text = torch.tensor([[*tokens, *(token for token in ids if token not in tokens)]])
        with torch.no_grad():
            want = model(input_ids=text, attention_mask=torch.ones_like(text), **extra).logits[0, -1]
        got = served.logits(input_ids=text[0, len(tokens) :].tolist(), prompt=name)
        # The tied output layer follows trainable tokens in PEFT; a prompt changes no output layer.
        keep = np.setdiff1d(np.arange(len(got)), tokens)
        differences.append(difference(got[keep], want.numpy()[keep]))
    record("PEFT", base, method, differences)


@pytest.mark.parametrize("method", ["prompt tuning", "P-tuning, MLP", "prefix tuning", "multitask prompt tuning"])
def test_peft_on_t5(method: str, bases: dict[str, Path], package: Any, runtime: Any, tmp_path: Path) -> None:
    import torch

    model = tuned(tmp_path / "adapter", bases["t5"], "AutoModelForSeq2SeqLM", method, "SEQ_2_SEQ_LM")
    multitask = method.startswith("multitask")
    file = tmp_path / "prompt.safetensors"
    convert_prompt(
        tmp_path / "adapter", file, base=package("t5"), task_index=1 if multitask else None, name=f"t5 {method}"
    )
    served = runtime("t5")
    name = served.add_prompt(file)
    extra = {"task_ids": torch.tensor([1])} if multitask else {}
    differences = []
    for ids in IDS:
        text = torch.tensor([ids])
        found = model.generate(
            input_ids=text,
            attention_mask=torch.ones_like(text),
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **extra,
        )
        differences.append(difference(served.logits(input_ids=ids, prompt=name), found.logits[0][0]))
    record("PEFT", "t5", method, differences)


@pytest.mark.parametrize(("base", "kind", "method"), HEAD_CASES)
def test_peft_heads(
    base: str, kind: str, method: str, bases: dict[str, Path], package: Any, runtime: Any, tmp_path: Path
) -> None:
    import torch

    auto = {
        "SEQ_CLS": "AutoModelForSequenceClassification",
        "TOKEN_CLS": "AutoModelForTokenClassification",
        "QUESTION_ANS": "AutoModelForQuestionAnswering",
    }[kind]
    options = {} if kind == "QUESTION_ANS" else {"num_labels": 3}
    model = tuned(tmp_path / "adapter", bases[base], auto, method, kind, **options)
    if base == "pooled-bert" and kind == "SEQ_CLS":
        pooler = model.get_base_model().bert.pooler.dense
        with torch.no_grad():  # the base's own pooler, in both
            source = open_base(bases[base])
            pooler.weight.copy_(source.pooler.dense.weight)
            pooler.bias.copy_(source.pooler.dense.bias)
    if base == "llama" and kind == "QUESTION_ANS":
        take_base(model, bases[base])
    file = tmp_path / "prompt.safetensors"
    convert_prompt(tmp_path / "adapter", file, base=package(base), name=f"{kind} {method}")
    differences = []
    for ids in IDS:
        text = torch.tensor([ids])
        with torch.no_grad():
            out = model(input_ids=text, attention_mask=torch.ones_like(text))
        if kind == "SEQ_CLS":
            served = runtime(base)
            answer = served.run([Request(input_ids=ids, prompt=served.add_prompt(file))])[0]
            differences.append(difference(list(answer.logits.values()), out.logits[0]))
            continue
        want = out.logits[0] if kind == "TOKEN_CLS" else torch.stack([out.start_logits[0], out.end_logits[0]], -1)
        # PEFT trains position i for text token i of an answer, virtual tokens in front or not.
        text_rows = want[: len(ids)] if kind == "QUESTION_ANS" else want[-len(ids) :]
        differences.append(difference(token_scores(package(base), file, ids), text_rows))
    record("PEFT", base, f"{method}, {kind}", differences)


@pytest.mark.parametrize(
    ("base", "method"),
    [
        ("llama", "prompt tuning"),
        ("llama", "prefix tuning"),
        ("pooled-bert", "prompt tuning"),
        ("pooled-bert", "prefix tuning"),
        ("t5", "prompt tuning"),
    ],
)
def test_peft_embeddings(
    base: str, method: str, bases: dict[str, Path], package: Any, runtime: Any, tmp_path: Path
) -> None:
    """FEATURE_EXTRACTION: the last token's state of a decoder, the first text token's of an encoder (T5: its own)."""
    import torch

    auto = "AutoModelForTextEncoding" if base == "t5" else "AutoModel"
    model = tuned(tmp_path / "adapter", bases[base], auto, method, "FEATURE_EXTRACTION")
    file = tmp_path / "prompt.safetensors"
    convert_prompt(tmp_path / "adapter", file, base=package(base), name=f"embed {method}")
    served, differences = runtime(base), []
    name = served.add_prompt(file)
    for ids in IDS:
        text = torch.tensor([ids])
        with torch.no_grad():
            states = model(input_ids=text, attention_mask=torch.ones_like(text)).last_hidden_state[0]
        want = states[-1] if base == "llama" else states[-len(ids)]
        pooling = "last" if base == "llama" else "cls"
        differences.append(difference(served.embed([""], input_ids=[ids], prompt=name, pooling=pooling)[0], want))
    record("PEFT", base, f"{method}, FEATURE_EXTRACTION", differences)


@pytest.mark.parametrize("case", OPENPROMPT)
def test_openprompt(case: str, golden: Path, package: Any, runtime: Any, tmp_path: Path) -> None:
    expected = json.loads((golden / case / "expected.json").read_text("utf-8"))
    file = tmp_path / "prompt.safetensors"
    convert_prompt(
        golden / case / "checkpoint.ckpt",
        file,
        base=package(expected["base"]),
        template=expected["template"],
        labels=("positive", "negative"),
        name=case,
    )
    served = runtime(expected["base"])
    name = served.add_prompt(file)
    differences = []
    for text, labels in zip(expected["texts"], expected["label_logits"], strict=True):
        answer = served.classify(text, prompt=name)
        assert list(answer.logits) == ["positive", "negative"]
        if load_prompt(file).head_spec is not None:
            differences.append(difference(list(answer.logits.values()), labels))
            continue
        # OpenPrompt normalises over the label words, the runtime over the vocabulary: probabilities are the same.
        differences.append(difference(list(answer.scores.values()), np.exp(labels)))
    record("OpenPrompt 1.0.1", expected["base"], case.removeprefix("openprompt-").rpartition("-")[0], differences)


WORDS = {
    "gpt2": (" great", " good", " bad", " terrible", " film", " story", " music", " acting", " was", " it", " the"),
    "bert": ("great", "good", "bad", "terrible", "film", "story", "music", "acting", "was", "it", "the"),
    "t5": ("great", "bad", "it", "story", "a", "t", "?"),
}


def of_openprompt(logits: Any, ids: Any) -> Any:
    """`ManualVerbalizer.process_logits` of OpenPrompt 1.0.1 on logits that it recorded; -1 is padding."""
    there = ids >= 0
    chosen = np.asarray(logits)[np.maximum(ids, 0)] - 10000 * (1 - there)
    shares = np.exp(chosen - chosen.max())
    words = np.log(shares / shares.sum() + 1e-15)
    return (words * there).sum(-1) / there.sum(-1)


@pytest.mark.parametrize("case", ["openprompt-soft-gpt2", "openprompt-soft-bert", "openprompt-soft-t5"])
def test_openprompt_labels_of_several_words(
    case: str, golden: Path, bases: dict[str, Path], package: Any, runtime: Any, tmp_path: Path
) -> None:
    """OpenPrompt takes the mean of the words' log-probabilities; labels were told by the sum of probabilities."""
    import torch
    from transformers import AutoTokenizer

    expected = json.loads((golden / case / "expected.json").read_text("utf-8"))
    base = expected["base"]
    tokenizer = AutoTokenizer.from_pretrained(bases[base])
    pool = [
        ids[0]
        for word in WORDS[base]
        if len(ids := tokenizer.encode(word, add_special_tokens=False)) == 1 and ids[0] > 2
    ]
    state = torch.load(golden / case / "checkpoint.ckpt", weights_only=True)
    served, random = runtime(base), np.random.default_rng(0)
    others = 0
    for number in range(8):
        ids = np.full((3, 3), -1)
        chosen = random.permutation(pool)[:6]
        ids[0, :3], ids[1, :2], ids[2, :1] = chosen[:3], chosen[3:5], chosen[5:]
        there = torch.from_numpy((ids >= 0).astype(np.int64))
        words = {"label_words_ids": torch.from_numpy(np.maximum(ids, 0))[..., None], "words_ids_mask": there[..., None]}
        words["label_words_mask"] = there
        torch.save({**state, **{f"verbalizer.{key}": value for key, value in words.items()}}, tmp_path / "words.ckpt")
        file = tmp_path / f"{number}.safetensors"
        report = convert_prompt(
            tmp_path / "words.ckpt",
            file,
            base=package(base),
            template=expected["template"],
            labels=("a", "b", "c"),
            name=f"{case} words {number}",
        )
        assert load_prompt(file).verbalizer_aggregation == "mean"
        assert not any("mean" in line for line in report.dropped)
        name = served.add_prompt(file)
        for text, logits in zip(expected["texts"], expected["mask_logits"], strict=True):
            want = of_openprompt(logits, ids)
            answer = served.classify(text, prompt=name)
            assert answer.label == "abc"[int(want.argmax())]
            shares = np.exp(want) / np.exp(want).sum()
            assert difference(list(answer.scores.values()), shares) <= TOLERANCE
            sums = [np.exp(np.asarray(logits)[row[row >= 0]]).sum() for row in ids]
            others += int(np.argmax(sums)) != int(want.argmax())
    assert others  # labels that the sum of probabilities would have told otherwise


def test_a_soft_verbalizer_that_never_saw_the_mask(golden: Path, package: Any, tmp_path: Path) -> None:
    source = golden / "openprompt-softverbalizer-gpt2/checkpoint.ckpt"
    with pytest.raises(UnsupportedError, match="shifts the logits alone"):
        convert_prompt(source, tmp_path / "no.safetensors", base=package("gpt2"))


def test_openprompt_vocabulary_logits(golden: Path, package: Any, runtime: Any, tmp_path: Path) -> None:
    """The same through every logit, where the answer is the next token."""
    for case in ("openprompt-soft-gpt2", "openprompt-ptuning-lstm-gpt2", "openprompt-prefix-gpt2"):
        expected = json.loads((golden / case / "expected.json").read_text("utf-8"))
        file = tmp_path / f"{case}.safetensors"
        convert_prompt(
            golden / case / "checkpoint.ckpt",
            file,
            base=package("gpt2"),
            template=expected["template"],
            name=f"{case}2",
        )
        served = runtime("gpt2")
        name = served.add_prompt(file)
        for text, logits in zip(expected["texts"], expected["mask_logits"], strict=True):
            assert difference(served.logits(text, prompt=name), logits) <= TOLERANCE


@pytest.mark.parametrize("case", P_TUNING_V2)
def test_p_tuning_v2(case: str, golden: Path, package: Any, runtime: Any, tmp_path: Path) -> None:
    expected = json.loads((golden / case / "expected.json").read_text("utf-8"))
    base, file = expected["base"], tmp_path / "prompt.safetensors"
    convert_prompt(golden / case, file, base=package(base), name=case)
    differences = []
    for ids, logits in zip(expected["input_ids"], expected["logits"], strict=True):
        if load_prompt(file).task == "classify":
            served = runtime(base)
            answer = served.run([Request(input_ids=ids, prompt=served.add_prompt(file))])[0]
            differences.append(difference(list(answer.logits.values()), logits))
        else:
            differences.append(difference(token_scores(package(base), file, ids), logits))
    record("P-Tuning v2", base, case.removeprefix("p-tuning-v2-").rpartition("-")[0] or "classification", differences)


def test_the_table_in_the_docs(request: pytest.FixtureRequest) -> None:
    expected = 2 * len(DECODER_METHODS) + 4 + 5 + len(HEAD_CASES) + len(OPENPROMPT) + len(P_TUNING_V2)
    if len(MEASURED) != expected:
        pytest.fail(f"{len(MEASURED)} of {expected} comparisons ran; run this file whole", pytrace=False)
    lines = [
        "# Prompts of other tools, served by edgeprompt",
        "",
        "Generated by `tests/exporters/importers/test_parity.py` on tiny random models; do not edit. The tool's own",
        "forward in PyTorch is compared with the converted prompt in ONNX Runtime, in float32. The table has the",
        "largest difference of a logit (OpenPrompt: of a label's probability). If the largest logit is above 1, the",
        "difference is a share of it. PEFT 0.21 runs in the test. OpenPrompt 1.0.1 and P-Tuning v2 were recorded",
        "with their code by the scripts in tests/golden/foreign.",
        "",
        "| tool | base | method | largest difference below |",
        "| ---- | ---- | ------ | ------------------------ |",
    ]
    lines += [f"| {tool} | {base} | {method} | {bound(worst)} |" for (tool, base, method), worst in MEASURED.items()]
    text = "\n".join(lines) + "\n"
    if os.environ.get("EDGEPROMPT_WRITE_DOCS"):
        DOC.write_text(text, encoding="utf-8")
    assert DOC.read_text("utf-8") == text


def bound(worst: float) -> str:
    """The next power of ten, at least 1e-5: rounding differs from machine to machine below that."""
    return f"1e{max(-5, math.ceil(math.log10(worst or 1e-9)))}"
