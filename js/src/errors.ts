/** Everything edgeprompt throws on purpose; the kinds and their names are those of the Python package. */

/** Base of all errors that edgeprompt throws on purpose. A message is one line: the value, what is allowed, what to do. */
export class EdgePromptError extends Error {
  constructor(message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = new.target.kind;
  }
  static readonly kind: string = "EdgePromptError";
}

/** A prompt file is broken, hostile, or breaks the format. */
export class PromptFileError extends EdgePromptError {
  static override readonly kind = "PromptFileError";
}
/** An exported package is broken, incomplete, or of another contract version. */
export class PackageError extends EdgePromptError {
  static override readonly kind = "PackageError";
}
/** A prompt was made for another base model, tokenizer or geometry. */
export class BaseMismatchError extends EdgePromptError {
  static override readonly kind: string = "BaseMismatchError";
}
/** A prompt was tuned for other weights of the base, too far from the package's. */
export class OtherWeightsError extends BaseMismatchError {
  static override readonly kind: string = "OtherWeightsError";
}
/** A template does not parse, or does not fit its prompt. */
export class TemplateError extends EdgePromptError {
  static override readonly kind = "TemplateError";
}
/** What the caller passed cannot be used (too long, an id out of range, a bad option). */
export class InputError extends EdgePromptError {
  static override readonly kind = "InputError";
}
/** A combination that edgeprompt knows and does not offer; the message says why and what to use. */
export class UnsupportedError extends EdgePromptError {
  static override readonly kind = "UnsupportedError";
}
/** No prompt of that name is loaded. */
export class PromptNotFoundError extends EdgePromptError {
  static override readonly kind = "PromptNotFoundError";
}
/** An execution provider was asked for and is not there, or failed to start. */
export class ProviderError extends EdgePromptError {
  static override readonly kind = "ProviderError";
}
/** A memory or queue budget would be exceeded; the message says the limits. */
export class CapacityError extends EdgePromptError {
  static override readonly kind = "CapacityError";
}
/** The request was cancelled, or the runtime was closed, before it finished. */
export class RequestCancelledError extends EdgePromptError {
  static override readonly kind = "RequestCancelledError";
}
/** The request's deadline passed between two steps. */
export class RequestTimeoutError extends EdgePromptError {
  static override readonly kind = "RequestTimeoutError";
}
/** An optional dependency is not installed; the message has the install command. */
export class MissingDependencyError extends EdgePromptError {
  static override readonly kind = "MissingDependencyError";
}

const KINDS: Record<string, new (message: string) => EdgePromptError> = Object.fromEntries(
  [
    PromptFileError,
    PackageError,
    BaseMismatchError,
    OtherWeightsError,
    TemplateError,
    InputError,
    UnsupportedError,
    PromptNotFoundError,
    ProviderError,
    CapacityError,
    RequestCancelledError,
    RequestTimeoutError,
    MissingDependencyError,
    EdgePromptError,
  ].map((kind) => [kind.kind, kind]),
);

/** An error as plain data, for a message between threads. */
export interface PlainError {
  kind: string;
  message: string;
}

export function packError(error: unknown): PlainError {
  if (error instanceof Error) return { kind: error.name, message: error.message };
  return { kind: "Error", message: String(error) };
}

export function unpackError(plain: PlainError): Error {
  const kind = KINDS[plain.kind];
  return kind ? new kind(plain.message) : Object.assign(new Error(plain.message), { name: plain.kind });
}
