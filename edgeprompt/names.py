"""The names of the graph contract, each written once (docs/graph-contract.md)."""

from functools import cache

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"
TOKEN_TYPE_IDS = "token_type_ids"
MASK_POSITIONS = "mask_positions"
PROMPT_EMBEDDINGS = "prompt_embeddings"
LOGITS = "logits"
LOGITS_TO_KEEP = "logits_to_keep"
KEPT_LOGITS = "kept_logits"
HIDDEN_STATES = "hidden_states"
LAST_HIDDEN_STATE = "last_hidden_state"
POOLER_OUTPUT = "pooler_output"
ENCODER_HIDDEN_STATES = "encoder_hidden_states"
ENCODER_ATTENTION_MASK = "encoder_attention_mask"
PAST_KEY_VALUES = "past_key_values"

DECODER_ONLY = "decoder-only"
ENCODER_ONLY = "encoder-only"
ENCODER_DECODER = "encoder-decoder"
ARCHITECTURES = (DECODER_ONLY, ENCODER_ONLY, ENCODER_DECODER)

PRECISIONS = ("fp32", "fp16", "int8", "int4", "gguf")
BLOCK_SIZES = (32, 64, 128)
NATIVE, WEB = "native", "web"
TARGETS = (NATIVE, WEB)
"""What runs a package's graphs: ONNX Runtime's native builds, or its WebAssembly build too."""
ROUTES = ("genai", "torch", "onnx")
TASKS = ("classify", "generate", "tag", "qa", "embed")
PROBLEM_TYPES = ("single_label", "multi_label", "regression")
METHODS = (
    "prompt-tuning",
    "p-tuning",
    "prefix-tuning",
    "p-tuning-v2",
    "multitask-prompt-tuning",
)

PROMPT_METADATA = "edgeprompt"
"""Key of safetensors metadata that a prompt file keeps its JSON under."""
KV_METADATA = "edgeprompt_kv"
"""The metadata key of a prompt that was written as keys and values."""
WRITTEN_BY = "written_by"
"""Key of safetensors metadata that says who wrote a PEFT adapter ("edgeprompt")."""
SESSION_METADATA = "edgeprompt_session"
"""Key of safetensors metadata that says what a saved session depends on."""
ANSWERS_FORMAT = "edgeprompt-answers"
"""`format` in the first line of a file with a teacher's answers."""
MANIFEST = "edgeprompt.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
PROMPTS_FOLDER = "prompts"


@cache
def past(layer: int, part: str) -> str:
    """Input name of a layer's self-attention cache; `part` is "key" or "value"."""
    return f"past_key_values.{layer}.{part}"


@cache
def present(layer: int, part: str) -> str:
    """Output name of a layer's self-attention cache; `part` is "key" or "value"."""
    return f"present.{layer}.{part}"


@cache
def cross_past(layer: int, part: str) -> str:
    """Decoder input name of a layer's cross-attention keys or values (encoder-decoder)."""
    return f"past_key_values.{layer}.cross.{part}"


@cache
def cross_present(layer: int, part: str) -> str:
    """Encoder output name of a layer's cross-attention keys or values (encoder-decoder)."""
    return f"present.{layer}.cross.{part}"
