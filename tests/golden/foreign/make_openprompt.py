"""Checkpoints of OpenPrompt 1.0.1, and what its own forward computes, on tiny random models.

    python3.11 -m venv old && old/bin/pip install torch==2.13.0 transformers==4.30.2 "numpy<2" "pyarrow<15" \
        "datasets<3" yacs dill tqdm tensorboardX nltk scikit-learn sentencepiece rouge scipy protobuf==3.20.3
    old/bin/pip install --no-deps openprompt==1.0.1
    old/bin/python make_openprompt.py tests/golden/foreign

OpenPrompt's last release imports neither on transformers 5 nor on numpy 2, hence an environment of its own.
"""

import copy
import json
import shutil
import sys
from pathlib import Path

import torch
from openprompt import PromptDataLoader, PromptForClassification
from openprompt.data_utils import InputExample
from openprompt.plms.lm import LMTokenizerWrapper
from openprompt.plms.mlm import MLMTokenizerWrapper
from openprompt.plms.seq2seq import T5TokenizerWrapper
from openprompt.prompts import (
    ManualVerbalizer,
    MixedTemplate,
    PrefixTuningTemplate,
    PtuningTemplate,
    SoftTemplate,
    SoftVerbalizer,
)
from sentencepiece import SentencePieceTrainer
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    BertTokenizerFast,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    GPT2TokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
    T5TokenizerFast,
)

TEXTS = ["the film is great and I love it", "bad story", "the acting was dull, the music was great"]
CORPUS = [*TEXTS, "it was positive", "it was negative", "good bad great terrible film story music acting . , ! ?"]
WORDS = [["great", "good"], ["bad"]]


def bases(out: Path) -> dict:
    torch.manual_seed(0)
    made = {}
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        CORPUS * 20, vocab_size=320, min_frequency=1, special_tokens=["<|endoftext|>"], show_progress=False
    )
    bpe.save_model(str(out))
    gpt2 = GPT2Tokenizer(str(out / "vocab.json"), str(out / "merges.txt"))
    gpt2.pad_token = gpt2.eos_token
    for name in ("vocab.json", "merges.txt"):
        (out / name).unlink()
    config = GPT2Config(vocab_size=len(gpt2), n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    config.bos_token_id = config.eos_token_id = gpt2.eos_token_id
    made["gpt2"] = (GPT2LMHeadModel(config), gpt2, LMTokenizerWrapper)

    words = sorted({word.strip(".,!?") for text in CORPUS for word in text.lower().split()} - {""})
    (out / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", "!", "?", *words])
    )
    bert = BertTokenizer(str(out / "vocab.txt"))
    (out / "vocab.txt").unlink()
    config = BertConfig(
        vocab_size=len(bert),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    made["bert"] = (BertForMaskedLM(config), bert, MLMTokenizerWrapper)

    (out / "corpus.txt").write_text("\n".join(CORPUS * 20))
    SentencePieceTrainer.Train(
        input=str(out / "corpus.txt"),
        model_prefix=str(out / "t5"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name="identity",
        user_defined_symbols=["▁great", "▁bad"],
        minloglevel=2,
    )
    t5 = T5Tokenizer(str(out / "t5.model"), extra_ids=4, legacy=False)
    for name in ("corpus.txt", "t5.vocab"):
        (out / name).unlink()
    config = T5Config(
        vocab_size=len(t5),
        d_model=16,
        d_kv=8,
        num_heads=2,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=2,
        decoder_start_token_id=0,
        initializer_factor=2.0,
    )
    made["t5"] = (T5ForConditionalGeneration(config), t5, T5TokenizerWrapper)
    for name, (model, tokenizer, _) in made.items():
        model.eval().save_pretrained(out / name, safe_serialization=True)
        fast = {"gpt2": GPT2TokenizerFast, "bert": BertTokenizerFast, "t5": T5TokenizerFast}[name]
        tokenizer.save_pretrained(out / "slow")
        fast.from_pretrained(out / "slow").save_pretrained(out / name)
        shutil.rmtree(out / "slow")
        for file in ("spiece.model", "vocab.json", "merges.txt", "vocab.txt"):
            (out / name / file).unlink(missing_ok=True)  # tokenizer.json says it all
    (out / "t5.model").unlink()
    return made


def case(out: Path, name: str, base: str, made: dict, make_template, text: str, make_verbalizer) -> None:
    """One checkpoint as a user saves it (`torch.save(model.state_dict())`), and its logits."""
    torch.manual_seed(sum(map(ord, name)))
    model, tokenizer, wrapper = made[base]
    model = copy.deepcopy(model)
    template = make_template(model, tokenizer)
    template.text = text
    verbalizer = make_verbalizer(model, tokenizer)
    whole = PromptForClassification(plm=model, template=template, verbalizer=verbalizer, freeze_plm=True).eval()
    with torch.no_grad():
        for key, parameter in template.named_parameters():  # away from its start, as training would leave it
            if parameter.is_floating_point() and not key.startswith("raw_embedding"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    loader = PromptDataLoader(
        dataset=[InputExample(guid=i, text_a=text_a, label=0) for i, text_a in enumerate(TEXTS)],
        template=template,
        tokenizer=tokenizer,
        tokenizer_wrapper_class=wrapper,
        max_seq_length=48,
        decoder_max_length=3,
        batch_size=1,
        shuffle=False,
    )
    words, labels = [], []
    with torch.no_grad():
        for batch in loader:
            labels.append(whole(copy.deepcopy(batch))[0].tolist())
            outputs = whole.prompt_model(batch)
            words.append(whole.extract_at_mask(outputs.logits, batch)[0].tolist())
    folder = out / name
    folder.mkdir(exist_ok=True)
    torch.save(whole.state_dict(), folder / "checkpoint.ckpt")
    facts = {"base": base, "template": text, "texts": TEXTS, "mask_logits": words, "label_logits": labels}
    (folder / "expected.json").write_text(json.dumps(facts) + "\n")


def manual(model, tokenizer):
    return ManualVerbalizer(tokenizer, classes=["positive", "negative"], label_words=[["great"], ["bad"]])


def main() -> None:
    out = Path(sys.argv[1])
    made = bases(out)
    plain = '{"placeholder":"text_a"} it was {"mask"}'
    mixed = '{"soft": None, "duplicate": 2} {"placeholder":"text_a"} {"soft": "it was"} {"mask"}'
    case(out, "openprompt-soft-gpt2", "gpt2", made, lambda m, t: SoftTemplate(m, t, num_tokens=4), plain, manual)
    case(out, "openprompt-soft-bert", "bert", made, lambda m, t: SoftTemplate(m, t, num_tokens=4), plain, manual)
    case(out, "openprompt-soft-t5", "t5", made, lambda m, t: SoftTemplate(m, t, num_tokens=4), plain, manual)
    case(out, "openprompt-mixed-gpt2", "gpt2", made, lambda m, t: MixedTemplate(m, t), mixed, manual)
    case(out, "openprompt-mixed-bert", "bert", made, lambda m, t: MixedTemplate(m, t), mixed, manual)

    def lstm(m, t):
        return PtuningTemplate(m, t, prompt_encoder_type="lstm")

    def mlp(m, t):
        return PtuningTemplate(m, t, prompt_encoder_type="mlp")

    def prefix(m, t):
        return PrefixTuningTemplate(m, m.config, t, num_token=3, mid_dim=8)

    # Its wrapper for causal models skips soft tokens that have no text, on which PtuningTemplate then fails.
    worded = '{"soft": "the text"} {"placeholder":"text_a"} {"soft": "it was"} {"mask"}'
    case(out, "openprompt-ptuning-lstm-gpt2", "gpt2", made, lstm, worded, manual)
    case(out, "openprompt-ptuning-mlp-t5", "t5", made, mlp, mixed, manual)
    case(out, "openprompt-prefix-gpt2", "gpt2", made, prefix, plain, manual)
    case(out, "openprompt-prefix-t5", "t5", made, prefix, plain, manual)

    def soft(m, t):
        return SoftVerbalizer(t, m, num_classes=2)

    case(
        out, "openprompt-softverbalizer-gpt2", "gpt2", made, lambda m, t: SoftTemplate(m, t, num_tokens=4), plain, soft
    )
    case(out, "openprompt-softverbalizer-mixed-gpt2", "gpt2", made, lambda m, t: MixedTemplate(m, t), mixed, soft)
    case(out, "openprompt-softverbalizer-prefix-gpt2", "gpt2", made, prefix, plain, soft)


main()
