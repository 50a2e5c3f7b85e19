/** The names of the graph contract and of the formats, each written once. */
export const INPUT_IDS = "input_ids";
export const ATTENTION_MASK = "attention_mask";
export const POSITION_IDS = "position_ids";
export const TOKEN_TYPE_IDS = "token_type_ids";
export const MASK_POSITIONS = "mask_positions";
export const PROMPT_EMBEDDINGS = "prompt_embeddings";
export const LOGITS = "logits";
export const HIDDEN_STATES = "hidden_states";
export const LAST_HIDDEN_STATE = "last_hidden_state";
export const POOLER_OUTPUT = "pooler_output";
export const ENCODER_HIDDEN_STATES = "encoder_hidden_states";
export const ENCODER_ATTENTION_MASK = "encoder_attention_mask";
export const PAST_KEY_VALUES = "past_key_values";
export const ENCODER_PAST = "encoder_past_key_values";

export const MANIFEST = "edgeprompt.json";
export const TOKENIZER = "tokenizer.json";
export const TOKENIZER_CONFIG = "tokenizer_config.json";
export const CHAT_TEMPLATE = "chat_template.jinja";

export const ARCHITECTURES = ["decoder-only", "encoder-only", "encoder-decoder"] as const;
export const PRECISIONS = ["fp32", "fp16", "int8", "int4", "gguf"];
export const ROUTES = ["genai", "torch", "onnx"];
export const TASKS = ["classify", "generate", "tag", "qa", "embed"];
export const METHODS = ["prompt-tuning", "p-tuning", "prefix-tuning", "p-tuning-v2", "multitask-prompt-tuning"];

export type Part = "key" | "value";
export const PARTS: readonly Part[] = ["key", "value"];
export const past = (layer: number, part: Part): string => `past_key_values.${layer}.${part}`;
export const present = (layer: number, part: Part): string => `present.${layer}.${part}`;
export const crossPast = (layer: number, part: Part): string => `past_key_values.${layer}.cross.${part}`;
export const crossPresent = (layer: number, part: Part): string => `present.${layer}.cross.${part}`;

/** All keys and values of `layers` layers under a naming function, in order. */
export const perLayer = (layers: number, name: (layer: number, part: Part) => string): string[] =>
  Array.from({ length: layers }, (_, layer) => PARTS.map((part) => name(layer, part))).flat();
