/** What a request carries through an engine: when to stop, and where pieces of text go. */

import { RequestCancelledError, RequestTimeoutError } from "../errors.ts";
import type { Move, Strategy } from "../decoding/strategies.ts";
import { Clock, type Request } from "../results.ts";

export interface CallOptions {
  signal?: AbortSignal | undefined;
  onText?: ((piece: string) => void) | undefined;
}

export class Context {
  readonly clock = new Clock();

  constructor(
    private readonly request: Request,
    private readonly options: CallOptions,
  ) {}

  get onText(): ((piece: string) => void) | undefined {
    return this.options.onText;
  }

  /** Called between steps. */
  check(): void {
    if (this.options.signal?.aborted) throw new RequestCancelledError("the request was cancelled");
    const { timeout } = this.request;
    if (timeout !== undefined && this.clock.elapsed > timeout) {
      throw new RequestTimeoutError(`the request was not answered within ${timeout} s`);
    }
  }
}

/** Logits behind the last token of each sequence, and what the next step continues from. */
export interface Reached<S> {
  logits: Float32Array[];
  state: S;
}

/** Let a strategy go on from the logits behind the text until it is done. `pick`: the sequences of a state by their numbers. */
export async function decode<S, T>(
  strategy: Strategy<T>,
  reached: Reached<S>,
  step: (tokens: number[], state: S) => Promise<Reached<S>>,
  pick: (state: S, sequences: number[]) => S,
  context: Context,
): Promise<T> {
  const behindText = strategy.goesBack ? reached.state : null;
  for (let move: Move | null; (move = strategy.advance(reached.logits)); ) {
    context.check();
    // A turn of the event loop, so that an abort posted meanwhile is seen before the next step.
    await new Promise<void>((done) => pause(done));
    context.check();
    const { tokens, parents } = move;
    const from = parents ? reached.state : behindText!;
    const sequences = parents ?? tokens.map(() => 0);
    const same = reached.logits.length === 1 && sequences.length === 1;
    reached = await step(tokens, same ? from : pick(from, sequences));
  }
  return strategy.result();
}

const channel = typeof MessageChannel === "undefined" ? null : new MessageChannel();
const waiting: (() => void)[] = [];
if (channel) {
  channel.port1.onmessage = () => waiting.shift()?.();
  (channel.port1 as { unref?: () => void }).unref?.();
}

/** Call back in a later turn of the event loop, without the delay of nested timers. */
function pause(done: () => void): void {
  if (typeof setImmediate === "function") setImmediate(done);
  else if (channel) {
    waiting.push(done);
    channel.port2.postMessage(0);
  } else setTimeout(done);
}
