/** `edgeprompt/worker` of browsers: serves one package to the page that started it. */

import { serveChannel } from "./local.ts";
import { webPlatform } from "./platform/web.ts";

const scope = globalThis as unknown as { postMessage(message: unknown): void; onmessage: (event: MessageEvent) => void };
serveChannel(
  {
    post: (message) => scope.postMessage(message),
    listen: (onMessage) => {
      scope.onmessage = (event) => onMessage(event.data);
    },
    end: () => Promise.resolve(),
  },
  webPlatform,
);
