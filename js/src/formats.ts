/** `edgeprompt/formats`: the readers of the formats and the tokenizer, without a runtime. */
export { Template } from "./template.ts";
export { Tokenizer, type Encoding } from "./tokenizer/tokenizer.ts";
export { difference as fingerprintDifference } from "./fingerprint.ts";
export { parseManifest } from "./manifest.ts";
export { parsePrompt, type PromptFile } from "./prompt.ts";
