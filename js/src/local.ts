/** The service itself: in this thread, or for whoever is at the other end of a channel. */

import { EdgePromptError, packError } from "./errors.ts";
import type { AskOptions, Channel, Host, Method } from "./host.ts";
import { Service, type MakePlatform, type ServiceOptions } from "./service.ts";

/** Runs the service right here. */
export class LocalHost implements Host {
  private service: Service | null = null;

  constructor(private readonly makePlatform: MakePlatform) {}

  async ask(method: Method, args: any[], options: AskOptions = {}): Promise<any> {
    if (method === "open") {
      const [source, settings] = args as [string, ServiceOptions];
      this.service = await Service.open(this.makePlatform, source, settings, options.onProgress ?? (() => undefined), options.signal);
      return this.service.facts;
    }
    if (!this.service) throw new EdgePromptError("no package is open");
    const call = { signal: options.signal, onText: options.onText };
    const { service } = this;
    switch (method) {
      case "run":
        return service.run(args[0], call);
      case "stream":
        return service.stream(args[0], call);
      case "logits":
        return service.logits(args[0], call);
      case "embed":
        return service.embed(args[0], args[1], args[2], call);
      case "addPrompt":
        return service.addPrompt(args[0], args[1]);
      case "calibration":
        return service.calibration(args[0], args[1] ?? undefined);
      case "check":
        return service.check(args[0]);
      case "removePrompt":
        return service.removePrompt(args[0]);
      case "promptNames":
        return service.promptNames();
      case "close":
        return service.close();
    }
  }

  end(): Promise<void> {
    return Promise.resolve();
  }
}

/** Serve one package to whoever is at the other end of a channel. */
export function serveChannel(channel: Channel, makePlatform: MakePlatform): void {
  const host = new LocalHost(makePlatform);
  const running = new Map<number, AbortController>();
  const answer = async (message: { id: number; method: Method; args: unknown[]; abort?: boolean; wantsText?: boolean }): Promise<void> => {
    const { id } = message;
    if (message.abort) {
      running.get(id)?.abort();
      return;
    }
    const controller = new AbortController();
    running.set(id, controller);
    try {
      const value: unknown = await host.ask(message.method, message.args, {
        signal: controller.signal,
        onText: message.wantsText ? (text) => channel.post({ id, text }) : undefined,
        onProgress: (progress) => channel.post({ id, progress }),
      });
      channel.post({ id, value });
    } catch (error) {
      channel.post({ id, error: packError(error) });
    } finally {
      running.delete(id);
    }
  };
  channel.listen((message) => void answer(message), () => undefined);
}
