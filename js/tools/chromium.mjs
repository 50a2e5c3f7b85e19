// Finds a Chromium that runs here: that of @sparticuz/chromium, else an installed one. Says {executable, env} or null.
import { createReadStream, createWriteStream, existsSync, mkdtempSync, renameSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { pipeline } from "node:stream/promises";
import { fileURLToPath } from "node:url";
import { createBrotliDecompress } from "node:zlib";
import { chromium } from "playwright-core";

const modules = join(dirname(dirname(fileURLToPath(import.meta.url))), "node_modules");
const carried = join(modules, "@sparticuz/chromium/bin");
const unpacked = join(modules, ".chromium");

/** Unpacks the browser, and the libraries that it needs beside libc. */
async function unpack() {
  const { extract } = createRequire(join(carried, "any"))("tar-fs");
  const folder = mkdtempSync(`${unpacked}-`);
  const read = (file, ...into) => pipeline(createReadStream(join(carried, file)), createBrotliDecompress(), ...into);
  try {
    await Promise.all([
      read("chromium.br", createWriteStream(join(folder, "chromium"), { mode: 0o755 })),
      read("al2023.tar.br", extract(folder)),
      read("swiftshader.tar.br", extract(folder)),
    ]);
    if (!existsSync(unpacked)) renameSync(folder, unpacked);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

async function runs({ executable, env }) {
  try {
    const browser = await chromium.launch({
      executablePath: executable,
      env: { ...process.env, ...env },
      args: ["--no-sandbox", "--no-zygote", "--disable-gpu"],
      timeout: 30_000,
    });
    const page = await browser.newPage();
    await page.goto("data:text/html,<p>here</p>");
    await browser.close();
    return true;
  } catch {
    return false;
  }
}

const candidates = [];
if (process.platform === "linux" && process.arch === "x64" && existsSync(carried)) {
  if (!existsSync(unpacked)) await unpack();
  const executable = join(unpacked, "chromium");
  candidates.push({ executable, env: {} }, { executable, env: { LD_LIBRARY_PATH: join(unpacked, "lib") } });
}
for (const folder of (process.env.PATH ?? "").split(":")) {
  for (const name of ["chromium", "chromium-browser", "google-chrome"]) {
    if (existsSync(join(folder, name))) candidates.push({ executable: join(folder, name), env: {} });
  }
}
let found = null;
for (const one of candidates) if (!found && (await runs(one))) found = one;
process.stdout.write(JSON.stringify(found) + "\n");
process.exit(0);
