/** edgeprompt for browsers (and for bundlers that build for them). */

import { WorkerHost, type AskOptions, type Channel, type Host, type Method } from "./host.ts";
import { Runtime, checkSource, checkWorker, type LoadOptions } from "./runtime.ts";

/**
 * Open a package.
 * @param source The URL of its folder.
 */
export async function load(source: string | URL, options: LoadOptions = {}): Promise<Runtime> {
  checkSource(source, "URL");
  const url = new URL(source, globalThis.location?.href).href;
  return Runtime.open(() => makeHost(checkWorker(options.worker)), url, options);
}

function makeHost(worker: boolean | object): Host {
  if (worker === false || typeof Worker === "undefined") return new HereHost();
  const thread =
    worker === true
      ? new Worker(new URL("./worker-browser.js", import.meta.url), { type: "module" })
      : (worker as Worker);
  return new WorkerHost(channelTo(thread));
}

/** Runs the service in this thread; its code is fetched only for that. */
class HereHost implements Host {
  private host: Promise<Host> | null = null;

  async ask(method: Method, args: unknown[], options?: AskOptions): Promise<any> {
    this.host ??= import("./here.ts").then(({ makeHost }) => makeHost());
    return (await this.host).ask(method, args, options);
  }

  async end(): Promise<void> {
    await (await this.host)?.end();
  }
}

function channelTo(thread: Worker): Channel {
  return {
    post: (message) => thread.postMessage(message),
    listen: (onMessage, onFailure) => {
      thread.onmessage = (event) => onMessage(event.data);
      thread.onerror = (event) => onFailure(new Error(event.message || "it could not be started"));
    },
    end: () => {
      thread.terminate();
      return Promise.resolve();
    },
  };
}

export * from "./public.ts";
