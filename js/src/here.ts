/** What a page needs beside `browser.ts` where the model runs in its own thread. */

import { LocalHost } from "./local.ts";
import { webPlatform } from "./platform/web.ts";

export const makeHost = (): LocalHost => new LocalHost(webPlatform);
