"""From an instruction to a soft prompt, end to end on tiny random bases."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeprompt.errors import BaseMismatchError, DataError, InputError, UnsupportedError
from edgeprompt.prompts.file import load_prompt
from edgeprompt.prompts.hard_prompt import teacher_prompt
from edgeprompt.prompts.template import Template
from edgeprompt.tuning import Distillation, TuneOptions, tune
from edgeprompt.tuning.answers import AnswerFile, LabelAnswer, TextAnswer
from edgeprompt.tuning.examples import Example
from edgeprompt.tuning.options import answers_path

WORDS = {"animal": ["cat", "dog", "cow", "horse", "sheep"], "number": ["one", "two", "three", "four", "five"]}
VERBALIZER = {"animal": (" a",), "number": (" n",)}
ASK = "Say whether the words are animals or numbers.\n\n{text} is"


def toy_texts(count: int = 64) -> list[dict[str, str]]:
    chosen = random.Random(0)
    rows = []
    for _ in range(count):
        label = chosen.choice(list(WORDS))
        rows.append({"text": " ".join(chosen.choices(WORDS[label], k=chosen.randint(2, 6))), "label": label})
    return rows


def unlabelled(count: int = 64) -> list[dict[str, str]]:
    return [{"text": row["text"]} for row in toy_texts(count)]


TOY = TuneOptions(
    verbalizer=VERBALIZER, num_virtual_tokens=4, steps=40, learning_rate=0.1, eval_split=0.25, seed=3,
    distil=Distillation(ASK),
)  # fmt: skip


def options(*, distil: dict[str, Any] | None = None, **changes: Any) -> TuneOptions:
    asked = dataclasses.replace(TOY.distil, **(distil or {}))  # type: ignore[type-var]
    return dataclasses.replace(TOY, distil=asked, **changes)


def written(**distil: Any) -> TuneOptions:
    return options(verbalizer={}, task="generate", distil={"max_new_tokens": 6, **distil}, steps=4)


@pytest.fixture(scope="module")
def tiny_t5(save_tiny: Callable[..., Path]) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    return save_tiny(
        T5ForConditionalGeneration(
            T5Config(
                vocab_size=512, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_decoder_layers=2, num_heads=4,
                decoder_start_token_id=1, eos_token_id=0, pad_token_id=1, initializer_factor=2.0,
            )
        )
    )  # fmt: skip


def plain_scores(base: Path, text: str) -> np.ndarray[Any, Any]:
    """Log-probabilities of the two label words behind a text, by transformers alone, over the labels."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
    words = [tokenizer(word, add_special_tokens=False)["input_ids"] for (word,) in VERBALIZER.values()]
    assert all(len(word) == 1 for word in words)
    return logits.log_softmax(-1)[[word[0] for word in words]].log_softmax(-1).numpy()


def answers_of(path: Path, asked: TuneOptions, kind: Any) -> list[Any]:
    """What the teacher's file says, in the order of the texts."""
    file = answers_path(path, asked)
    head = json.loads(file.read_text().splitlines()[0])
    signature = {key: value for key, value in head.items() if key not in ("format", "version")}
    found = AnswerFile(file, signature)
    assert found.complete
    return list(found.read(kind, 1024))


@pytest.fixture(scope="module")
def taught(tiny_llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt of the tiny decoder that tells animals from numbers."""
    out = tmp_path_factory.mktemp("taught") / "taught.safetensors"
    made = TuneOptions(
        template="{prompt}{text} is", verbalizer=VERBALIZER, num_virtual_tokens=8, steps=40, learning_rate=0.1,
        eval_split=0.25, seed=3,
    )  # fmt: skip
    result = tune(tiny_llama_base, toy_texts(96), output=out, options=made)
    assert result.value is not None
    assert result.value >= 0.95
    return out


METHODS = pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "p-tuning", "learning_rate": 0.03},
        {"method": "prefix-tuning"},
    ],
    ids=["prompt", "p-tuning", "prefix"],
)
INFIX = {"method": "prefix-tuning", "template": "{text}{prompt} is", "steps": 120}


@pytest.fixture(scope="module")
def new_base(save_tiny: Callable[..., Path]) -> Path:
    """Another random Llama, as a base after an update."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=512, hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=0, pad_token_id=1,
        initializer_range=0.2,
    )  # fmt: skip
    return save_tiny(LlamaForCausalLM(config))


@pytest.mark.parametrize("changes", [*METHODS.args[1], INFIX], ids=["prompt", "p-tuning", "prefix", "infix"])
def test_a_prompt_moves_to_another_base(
    tiny_llama_base: Path, new_base: Path, taught: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    asked = Distillation(teacher=tiny_llama_base, teacher_prompt=taught, label_column="label", label_weight=0)
    moved = dataclasses.replace(TOY, distil=asked, verbalizer={}, num_virtual_tokens=8, **changes)
    result = tune(new_base, toy_texts(96), output=tmp_path / "p.safetensors", options=moved)
    found = load_prompt(result.path).distilled_from
    print(found)
    assert found["teacher_accuracy"]["value"] >= 0.9
    assert found["agreement"]["value"] >= 0.85
    assert found["accuracy"]["value"] >= 0.85
    assert found["prompt"] == load_prompt(taught).sha256
    assert result.prompt.verbalizer == VERBALIZER
    assert result.prompt.is_infix == ("template" in changes)
    assert str(result.prompt.template.without_prompt()).endswith("{text} is")


@METHODS
def test_an_instruction_becomes_a_prompt(
    tiny_llama_base: Path, tiny_t5: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    # Words that the random teachers do not always say.
    for base, words in ((tiny_llama_base, (" a", " n")), (tiny_t5, (" t", " s"))):
        texts = unlabelled(32)
        verbalizer = {"animal": (words[0],), "number": (words[1],)}
        asked = options(
            distil={"instruction": "Which are these? {text}"},
            verbalizer=verbalizer,
            eval_data=texts,
            steps=80,
            **changes,
        )
        result = tune(base, texts, output=tmp_path / f"{base.name}.safetensors", options=asked)
        labels = [int(answer.logprobs.argmax()) for answer in answers_of(result.path, asked, LabelAnswer)[:32]]
        print(base.name, labels.count(0), result.value, result.prompt.distilled_from["agreement"])
        most = result.prompt.distilled_from["teacher_says_most"]
        assert most["share"] == pytest.approx(max(labels.count(0), labels.count(1)) / 32, abs=1e-4)
        assert any("so agreement shows little" in note for note in result.notes) == (most["share"] >= 0.9)
        assert 6 <= labels.count(0) <= 26, "a teacher that always says the same teaches nothing"
        # Learned by heart: on the same texts, and better than always saying the same.
        assert result.prompt.distilled_from["agreement"]["value"] > max(labels.count(0), labels.count(1)) / 32
        assert result.prompt.distilled_from["agreement"]["value"] >= 0.8


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_free_text_has_the_teachers_tokens_and_chances(
    tiny_llama_base: Path, tiny_t5: Path, tmp_path: Path, kind: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    base = tiny_llama_base if kind == "decoder" else tiny_t5
    rows = unlabelled(24)
    result = tune(base, rows, output=tmp_path / "p.safetensors", options=written())
    assert result.prompt.task == "generate"
    assert result.prompt.generation["max_new_tokens"] == 6
    assert result.prompt.distilled_from["loss"].startswith("the teacher's distribution over every token")
    assert result.prompt.distilled_from["token_agreement"]["n"] == 6
    auto = AutoModelForCausalLM if kind == "decoder" else AutoModelForSeq2SeqLM
    model, tokenizer = auto.from_pretrained(base, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(base)
    for row, answer in zip(rows, answers_of(result.path, written(), TextAnswer), strict=True):
        ids = tokenizer(ASK.replace("{text}", row["text"]), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            whole = model.generate(
                ids, do_sample=False, max_new_tokens=6, output_logits=True, return_dict_in_generate=True
            )
        start = ids.shape[1] if kind == "decoder" else 1
        assert whole.sequences[0, start:].tolist() == answer.ids.tolist()
        for place, logits in enumerate(whole.logits):
            best = logits[0].log_softmax(-1)[answer.top[place].tolist()].numpy()
            np.testing.assert_allclose(answer.logprobs[place], best, atol=1e-3)


def test_the_loss_of_free_text_is_the_divergence(tiny_llama_base: Path, tmp_path: Path) -> None:
    """Over a vocabulary that is known whole, the coarse divergence is the divergence."""
    from edgeprompt.tuning.distilled import DistilGenerate

    vocab = 8

    class Model:
        vocab_size = vocab

        def logits(self, texts: Any, answers: Any, shared: Any) -> torch.Tensor:
            return student

    torch.manual_seed(0)
    student, teacher = torch.randn(3, vocab), torch.randn(3, vocab)
    values, tokens = teacher.log_softmax(-1).topk(vocab - 1)
    made = DistilGenerate(Model(), None, end=0, whole_text=False)  # type: ignore[arg-type]
    packed = [*tokens.int().numpy().ravel().tolist(), *values.numpy().ravel().view(np.int32).tolist()]
    outcome = made.measure([Example([1], tokens[:, 0].tolist(), packed)])
    expected = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum"
    )
    assert float(outcome.loss) == pytest.approx(float(expected), rel=1e-4)
    assert outcome.count == 3


def test_another_tokenizer_learns_the_text(
    tiny_llama_base: Path, other_tokenizer: Path, tmp_path: Path, capsys: Any
) -> None:
    asked = written(teacher=other_tokenizer)
    result = tune(tiny_llama_base, unlabelled(24), output=tmp_path / "p.safetensors", options=asked)
    assert "sequence-level distillation, as the tokenizers differ" in result.prompt.distilled_from["loss"]
    assert any("sequence-level" in note for note in result.notes)
    with pytest.raises(BaseMismatchError, match=r"--distil-loss kl compares tokens.*take --distil-loss text"):
        tune(tiny_llama_base, unlabelled(24), output=tmp_path / "q.safetensors",
             options=written(teacher=other_tokenizer, loss="kl"))  # fmt: skip
    # Labels are compared as labels, whatever the tokenizers.
    asked = options(steps=2, distil={"teacher": other_tokenizer})
    result = tune(tiny_llama_base, unlabelled(24), output=tmp_path / "r.safetensors", options=asked)
    assert "over the labels" in result.prompt.distilled_from["loss"]


@pytest.mark.parametrize("loss", ["kl", "text"])
def test_a_teacher_that_says_nothing_is_told(tiny_llama_base: Path, tmp_path: Path, caplog: Any, loss: str) -> None:
    """The student learned to say nothing, without a word about it."""

    def teacher(name: str, ends: Sequence[int]) -> Path:
        folder = shutil.copytree(tiny_llama_base, tmp_path / name)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(ends)}))
        return folder

    asked = written(teacher=teacher("silent", range(512)), loss=loss)
    with pytest.raises(DataError, match="answers no text with a word"):
        tune(tiny_llama_base, unlabelled(12), output=tmp_path / "p.safetensors", options=asked)
    assert not (tmp_path / "p.safetensors").exists()
    asked = written(teacher=teacher("terse", range(0, 512, 2)), loss=loss)
    with caplog.at_level("WARNING", "edgeprompt"):
        tune(tiny_llama_base, unlabelled(12), output=tmp_path / "q.safetensors", options=asked)
    assert re.search(r"the teacher answered \d+ of 12 texts without a word, the first row \d+ of", caplog.text)


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer of its own."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = ByteLevelBPETokenizer()
    texts = [row["text"] for row in toy_texts(200)]
    tokenizer.train_from_iterator(texts, vocab_size=300, special_tokens=["<eos>", "<pad>"], show_progress=False)
    folder = tmp_path_factory.mktemp("other")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, bos_token_id=0, eos_token_id=0, pad_token_id=1,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


def test_the_teacher_says_what_transformers_computes(tiny_llama_base: Path, tmp_path: Path) -> None:
    rows = [{"text": "cat dog"}, {"text": "one"}, {"text": "sheep two five"}, {"text": "cow"}]
    shots = toy_texts(8)
    asked = options(steps=1, distil={"shots": 2, "shots_from": shots})
    result = tune(tiny_llama_base, rows, output=tmp_path / "p.safetensors", options=asked)
    template = result.prompt.distilled_from["template"]
    assert teacher_prompt(result.prompt, name="t").template == Template.parse(template)
    assert template.startswith("Say whether the words are animals or numbers.\n\n")
    assert template.endswith("\n\n{text} is")
    assert template.count(" is a\n\n") == template.count(" is n\n\n") == 1, template
    answers = answers_of(result.path, asked, LabelAnswer)
    for row, answer in zip(rows, answers, strict=True):
        np.testing.assert_allclose(
            answer.logprobs,
            plain_scores(tiny_llama_base, template.replace("{text}", row["text"])),
            atol=1e-4,
        )


def test_what_was_interrupted_goes_on_to_the_same_bytes(tiny_llama_base: Path, tmp_path: Path) -> None:
    """A file of answers that was cut anywhere ends as the whole one, and so does the prompt."""
    rows, asked = unlabelled(48), written(temperature=0.7)
    whole = tune(tiny_llama_base, rows, output=tmp_path / "a.safetensors", options=dataclasses.replace(asked, name="p"))
    kept = answers_path(whole.path, asked).read_bytes()
    for number, cut in enumerate((len(kept) // 2, len(kept) - 3, kept.index(b"\n") + 20)):
        output = tmp_path / f"b{number}.safetensors"
        answers_path(output, asked).write_bytes(kept[:cut])
        again = tune(tiny_llama_base, rows, output=output, options=dataclasses.replace(asked, name="p"))
        assert answers_path(output, asked).read_bytes() == kept
        assert again.path.read_bytes() == whole.path.read_bytes()


def test_answers_to_another_question_are_made_anew(tiny_llama_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "p.safetensors"
    tune(tiny_llama_base, unlabelled(16), output=output, options=options(steps=1))
    kept = answers_path(output, TOY).read_bytes()
    again = tune(tiny_llama_base, unlabelled(16), output=output, options=options(steps=1))
    assert answers_path(output, TOY).read_bytes() == kept
    assert not any("made anew" in note for note in again.notes)
    seeded = tune(tiny_llama_base, unlabelled(16), output=output, options=options(steps=1, seed=8))
    assert answers_path(output, TOY).read_bytes() == kept  # nothing was drawn
    assert not any("made anew" in note for note in seeded.notes)
    other = tune(
        tiny_llama_base, unlabelled(16), output=output, options=options(steps=1, distil={"instruction": "{text}!"})
    )
    assert any("made anew" in note for note in other.notes)
    assert answers_path(output, TOY).read_bytes() != kept


def test_labels_are_mixed_in_where_there_are_some(tiny_llama_base: Path, tmp_path: Path) -> None:
    """With cross-entropy alone, the student learns what its teacher does not know."""
    rows: list[dict[str, Any]] = toy_texts(96)
    rows[5]["label"] = None
    asked = options(distil={"label_column": "label", "label_weight": 1.0}, num_virtual_tokens=8)
    found = tune(tiny_llama_base, rows, output=tmp_path / "p.safetensors", options=asked).prompt.distilled_from
    assert "cross-entropy" in found["loss"]
    assert found["accuracy"]["value"] >= 0.8 > found["teacher_accuracy"]["value"]
    rows[7]["label"] = "plant"
    with pytest.raises(DataError, match=r"row 8 .*label 'plant' has no verbalizer word"):
        tune(tiny_llama_base, rows, output=tmp_path / "q.safetensors", options=asked)
    assert not (tmp_path / "q.safetensors").exists()


def test_a_balanced_teacher(tiny_llama_base: Path, tiny_t5: Path, tmp_path: Path) -> None:
    """A constant preference for a label is removed: what differs between texts decides."""
    for base in (tiny_llama_base, tiny_t5):
        texts, path = unlabelled(48), tmp_path / f"{base.name}.safetensors"
        asked = options(
            distil={"balance": True, "instruction": "Which are these? {text}"},
            verbalizer={"animal": (" a",), "number": (" t",)},
            eval_data=texts,
            steps=80,
        )
        found = tune(base, texts, output=path, options=asked).prompt
        raw = np.stack([answer.logprobs for answer in answers_of(path, asked, LabelAnswer)])
        assert len(raw) == 96  # as the teacher said it: the same file serves runs that do not balance
        plain, mean = raw.argmax(1), raw.mean(0)
        balanced = (raw[48:] - mean).argmax(1)
        if base is tiny_t5:  # one-sided
            assert plain.mean() == 1.0
        assert 0.3 < balanced.mean() < 0.7
        most = found.distilled_from["teacher_says_most"]
        assert most["share"] == pytest.approx(max(balanced.mean(), 1 - balanced.mean()), abs=1e-4)
        assert found.distilled_from["calibration"] == pytest.approx((mean - mean.mean()).tolist(), abs=1e-5)
        read = load_prompt(path)
        assert teacher_prompt(read, name="t").calibration == tuple(found.distilled_from["calibration"])
        assert not read.calibration
        assert found.distilled_from["agreement"]["value"] >= 0.7


def test_only_labels_are_balanced(tiny_llama_base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--balance-teacher is for labels"):
        tune(tiny_llama_base, unlabelled(8), output=tmp_path / "p.safetensors", options=written(balance=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"instruction": "Say what it is."}, InputError, r"has no \{text\}; write it where the input stands"),
        ({"instruction": ""}, InputError, "the instruction is empty"),
        ({"instruction": "{shots}"}, InputError, r"has no \{text\}"),
        ({"instruction": "{prompt}{text}"}, InputError, r"holds \{prompt\}, which a teacher does not have"),
        ({"instruction": "{text} }"}, InputError, "the instruction '{text} }' has a stray"),
        ({"instruction": "{shots}{text}"}, InputError, "give --shots-from and --shots"),
        (
            {"instruction": "word " * 300 + "{text}"},
            InputError,
            r"takes \d+ tokens .* holds 256 positions: no text fits",
        ),
        ({"shots": 60, "shots_from": toy_texts(80)}, InputError, "take fewer --shots"),
    ],
)
def test_bad_instructions(
    tiny_llama_base: Path, tmp_path: Path, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        tune(tiny_llama_base, unlabelled(8), output=tmp_path / "p.safetensors", options=options(distil=changes))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_bad_texts_and_options(tiny_llama_base: Path, minilm_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.safetensors"
    with pytest.raises(DataError, match=r"row 2 .*the text in column 'text' is empty"):
        tune(tiny_llama_base, [{"text": "a"}, {"text": "  "}], output=out, options=options())
    with pytest.raises(DataError, match="has no column 'text'"):
        tune(tiny_llama_base, [{"body": "a"}], output=out, options=options())
    empty = tmp_path / "t.txt"
    empty.write_text("\n \n")
    with pytest.raises(DataError, match="is empty"):
        tune(tiny_llama_base, empty, output=out, options=options())
    with pytest.raises(InputError, match="the labels are not known"):
        tune(tiny_llama_base, unlabelled(4), output=out, options=options(task="classify", verbalizer={}))
    with pytest.raises(UnsupportedError, match="is an encoder, which reads no instruction"):
        tune(minilm_folder, unlabelled(4), output=out, options=options())
    with pytest.raises(UnsupportedError, match="has no chat template; leave out --chat"):
        tune(tiny_llama_base, unlabelled(4), output=out, options=options(distil={"chat": True}))
    for changes, message in (
        ({"instruction": None}, "give one"),
        ({"shots": 2}, "--shots and --shots-from go together"),
        ({"label_weight": 2.0}, "from 0 to 1"),
    ):
        with pytest.raises(InputError, match=message):
            options(distil=changes)
    assert [path.name for path in tmp_path.iterdir()] == ["t.txt"]


def test_prompts_that_cannot_be_moved(tiny_llama_base: Path, new_base: Path, taught: Path, tmp_path: Path) -> None:
    shipped = Path(__file__).resolve().parents[2] / "examples/prompts/minilm-sentiment.safetensors"
    out = tmp_path / "p.safetensors"

    def move(**asked: Any) -> None:
        made = dataclasses.replace(TOY, verbalizer={}, distil=Distillation(**asked))
        tune(new_base, unlabelled(8), output=out, options=made)

    with pytest.raises(UnsupportedError, match="answers through a head"):
        move(teacher=tiny_llama_base, teacher_prompt=shipped)
    with pytest.raises(BaseMismatchError, match=r"was made for base '.*' .* name its own base with --teacher"):
        move(teacher=new_base, teacher_prompt=taught)
    assert not out.exists()


def test_one_prompt_for_several_packages(tiny_llama_base: Path, tiny_llama_package: Path, tmp_path: Path) -> None:
    """The runtime of each package gives what the report says of its weights."""
    import edgeprompt
    from exporters import export_model

    other = export_model(
        tiny_llama_base, tmp_path / "int4", precision="int4", block_size=32, allow_quality_loss=True
    ).path
    rows = unlabelled(32)
    asked = options(
        package=(tiny_llama_package, other), steps=24, eval_data=rows, distil={"instruction": "Which are these? {text}"}
    )
    result = tune(tiny_llama_base, rows, output=tmp_path / "p.safetensors", options=asked)
    prompt = load_prompt(result.path)
    assert [one.precision for one in prompt.tuned_weights] == ["fp32", "int4"]
    assert [one["precision"] for one in prompt.distilled_from["first_token"]] == ["fp32", "int4"]
    teacher = [int(answer.logprobs.argmax()) for answer in answers_of(result.path, asked, LabelAnswer)[:32]]
    for package, figures in zip((tiny_llama_package, other), prompt.distilled_from["on"], strict=True):
        with edgeprompt.load(package) as runtime:
            runtime.add_prompt(prompt)
            said = [answer.label for answer in runtime.classify([row["text"] for row in rows], prompt=prompt.name)]
        agree = sum(list(VERBALIZER)[label] == other for label, other in zip(teacher, said, strict=True))
        assert agree / 32 == pytest.approx(figures["agreement"]["value"], abs=2 / 32)
    golden = prompt.golden
    assert golden is not None
    with edgeprompt.load(tiny_llama_package) as runtime:
        runtime.add_prompt(prompt)
        assert runtime.check(prompt.name).passed


def test_a_prompt_that_had_no_instruction(taught: Path) -> None:
    with pytest.raises(InputError, match="was not distilled from an instruction"):
        teacher_prompt(load_prompt(taught), name="t")


def test_a_frozen_first_position(tiny_llama_base: Path, tmp_path: Path) -> None:
    """A prefix starts as the instruction's own keys and values, and its first position stays."""
    from edgeprompt.base.load import load_base

    asked = options(method="prefix-tuning", steps=8)
    prompt = tune(tiny_llama_base, unlabelled(16), output=tmp_path / "p.safetensors", options=asked).prompt
    base = load_base(tiny_llama_base)
    ids = base.tokenizer(ASK.replace("{text}", ""), return_tensors="pt")["input_ids"][:, :4]  # type: ignore[misc]
    with torch.no_grad():
        cache = base.model(ids, use_cache=True).past_key_values
    start = np.stack([np.stack([layer.keys[0].numpy(), layer.values[0].numpy()]) for layer in cache.layers])
    assert prompt.past_key_values is not None
    np.testing.assert_allclose(prompt.past_key_values[..., 0, :], start[..., 0, :], atol=1e-5)
    assert np.abs(prompt.past_key_values[..., 1:, :] - start[..., 1:, :]).max() > 0.01
