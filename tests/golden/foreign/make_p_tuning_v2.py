"""Checkpoints of P-Tuning v2, and what its own forward computes, on tiny random models.

    git clone https://github.com/THUDM/P-tuning-v2   # commit 2873f47
    old/bin/python make_p_tuning_v2.py P-tuning-v2 tests/golden/foreign

The environment is that of make_openprompt.py, which writes the BERT base used here. The repository pins transformers
4.11; its classes for sequences run on 4.30 as they are. `model.deberta`, which they import and these cases do not
use, is replaced by an empty stand-in, because it imports a torch.onnx function that is gone. The classes for tagging
and question answering differ in two lines (no pooler, and the head on every position); those two cases are made here
from `PrefixEncoder` and a base without pooler, in the same key names.
"""

import json
import sys
import types
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, BertModel, RobertaConfig, RobertaModel

sys.path.insert(0, sys.argv[1])
stand_in = types.ModuleType("model.deberta")
for name in ("DebertaModel", "DebertaPreTrainedModel", "ContextPooler", "StableDropout"):
    setattr(stand_in, name, torch.nn.Module)
sys.modules["model.deberta"] = stand_in
from model.prefix_encoder import PrefixEncoder  # noqa: E402
from model.sequence_classification import (  # noqa: E402
    BertPrefixForSequenceClassification,
    RobertaPrefixForSequenceClassification,
)

OUT = Path(sys.argv[2])
IDS = [[2, 10, 11, 12, 13, 3], [2, 14, 15, 3], [2, 20, 21, 22, 23, 24, 25, 26, 3]]


class _PerToken(torch.nn.Module):
    """Tagging and question answering as the repository has them: base without pooler, head on every position."""

    def __init__(self, config, base, head):
        super().__init__()
        self.config, self.name = config, head
        self.bert = base
        setattr(self, head, torch.nn.Linear(config.hidden_size, config.num_labels))
        self.prefix_encoder = PrefixEncoder(config)
        self.get_prompt = types.MethodType(BertPrefixForSequenceClassification.get_prompt, self)
        self.pre_seq_len, self.n_layer, self.n_head = (
            config.pre_seq_len,
            config.num_hidden_layers,
            config.num_attention_heads,
        )
        self.n_embd = config.hidden_size // config.num_attention_heads
        self.prefix_tokens = torch.arange(self.pre_seq_len)
        self.dropout = torch.nn.Dropout(0.0)

    def forward(self, input_ids, attention_mask):
        past = self.get_prompt(batch_size=input_ids.shape[0])
        mask = torch.cat((torch.ones(input_ids.shape[0], self.pre_seq_len), attention_mask), dim=1)
        states = self.bert(input_ids, attention_mask=mask, past_key_values=past).last_hidden_state
        return types.SimpleNamespace(logits=getattr(self, self.name)(states))


def save(name, base, model):
    model.eval()
    with torch.no_grad():
        for parameter in model.prefix_encoder.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
        logits = [
            model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0].tolist()
            for ids in IDS
        ]
    folder = OUT / name
    folder.mkdir(exist_ok=True)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    model.config.save_pretrained(folder)
    (folder / "expected.json").write_text(json.dumps({"base": base, "input_ids": IDS, "logits": logits}) + "\n")


def configure(folder, projected):
    config = AutoConfig.from_pretrained(folder, num_labels=3, hidden_dropout_prob=0.0)
    config.pre_seq_len, config.prefix_hidden_size, config.prefix_projection = 5, 8, projected
    return config


def main():
    torch.manual_seed(0)
    bert, tokenizer = OUT / "bert", AutoTokenizer.from_pretrained(OUT / "bert")
    config = configure(bert, False)
    save("p-tuning-v2-bert", "bert", BertPrefixForSequenceClassification.from_pretrained(bert, config=config))
    config = configure(bert, True)
    save("p-tuning-v2-projected-bert", "bert", BertPrefixForSequenceClassification.from_pretrained(bert, config=config))
    config = configure(bert, False)
    for name, head in (("tagging", "classifier"), ("qa", "qa_outputs")):
        config.num_labels = 2 if name == "qa" else 3
        base = BertModel.from_pretrained(bert, add_pooling_layer=False)
        save(f"p-tuning-v2-{name}-bert", "bert", _PerToken(config, base, head))
    roberta = RobertaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=66,
        pad_token_id=1,
        initializer_range=0.3,
    )
    RobertaModel(roberta, add_pooling_layer=False).eval().save_pretrained(OUT / "roberta", safe_serialization=True)
    tokenizer.save_pretrained(OUT / "roberta")
    config = configure(OUT / "roberta", False)
    save(
        "p-tuning-v2-roberta",
        "roberta",
        RobertaPrefixForSequenceClassification.from_pretrained(OUT / "roberta", config=config),
    )


main()
