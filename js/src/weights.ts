/**
 * Whether a prompt may be served on a package's weights: those it was tuned for, or such as are near their base.
 *
 * A soft prompt follows the weights that it was tuned on. Two packages that are both near their base hold nearly the
 * same weights; where one of them is far, a prompt of the other may answer worse than no prompt.
 */

import { OtherWeightsError } from "./errors.ts";
import { repr } from "./json.ts";
import type { Manifest } from "./manifest.ts";
import type { PromptFile, TunedFor } from "./prompt.ts";

/** Key of the manifest's `extra`: hashes of prompt files that the exporter put in whatever they were tuned for. */
export const ALLOWED = "allowed_prompts";
const TUNED_QUALITY = "package_quality";
const EXACT = ["fp32", "fp16"];
/** Figures of a manifest's `quality`, and up to where a package counts as near its base. */
const NEAR = [
  ["kl_mean", "mean KL divergence", 0.05],
  ["embedding_distance_worst", "worst distance of an embedding", 0.05],
] as const;
/** Share of the vocabulary: a base with a higher perplexity has learned nothing that a figure could compare. */
const UNTRAINED = 0.5;

/** What a prompt was tuned for, in words, where that is not this package; null where it is, or where nothing is. */
export function differ(prompt: PromptFile, manifest: Manifest): string | null {
  if (!prompt.tunedFor.length) {
    const { promptEmbeddings, pastKeyValues, encoderPastKeyValues, head } = prompt;
    if (!promptEmbeddings && !pastKeyValues && !encoderPastKeyValues && !head.size) return null;
    // Other tools tune in float and note nothing.
    return EXACT.includes(manifest.precision) ? null : "weights that its file does not name";
  }
  const found = prompt.tunedFor.map((one) => other(one, manifest));
  return found.includes(null) ? null : [...new Set(found)].join(" and ");
}

function other({ precision, weightsHash }: TunedFor, manifest: Manifest): string | null {
  const same = precision === manifest.precision;
  if (weightsHash === null ? same : weightsHash === manifest.weightsHash) return null;
  return same && weightsHash !== null ? `another ${precision} package` : precision;
}

/** Refuse a prompt that was tuned for other weights, where they or the package's are far from the base. */
export function checkWeights(prompt: PromptFile, manifest: Manifest, sha256: string | null): void {
  const found = differ(prompt, manifest);
  const allowed: unknown = manifest.extra[ALLOWED];
  if (found === null || (sha256 !== null && Array.isArray(allowed) && allowed.includes(sha256))) return;
  const { vocabSize } = manifest.geometry;
  let far = howFar(manifest.quality, vocabSize);
  let whose = "this package is";
  if (far === null) {
    far = howFar(prompt.training[TUNED_QUALITY], vocabSize);
    whose = "that one is";
  }
  if (far === null) return;
  throw new OtherWeightsError(
    `prompt ${repr(prompt.name)} was tuned for ${found}, and ${whose} far from its base (${far}), so it may answer worse ` +
      `than no prompt; tune it for this package: edgeprompt tune ${manifest.base.name} DATA --for PACKAGE -o ` +
      `${prompt.name}.safetensors; allowOtherWeights serves it all the same`,
  );
}

function howFar(quality: unknown, vocabSize: number): string | null {
  if (!quality || typeof quality !== "object" || Array.isArray(quality)) return null;
  const figures = quality as Record<string, unknown>;
  if (Number(figures["perplexity_base"] ?? 0) >= UNTRAINED * vocabSize) return null;
  for (const [key, words, most] of NEAR) {
    const value = figures[key];
    if (typeof value === "number" && !(value <= most)) return `${words} ${Number(value.toPrecision(3))}, near is at most ${most}`;
  }
  return null;
}
