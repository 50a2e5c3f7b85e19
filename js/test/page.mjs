// Uses the example page in headless Chromium, as a person would: with a server, and when the server is gone.
import { readFileSync } from "node:fs";
import { openBrowser } from "../tools/browser.mjs";

const { executable, env, site, questions } = JSON.parse(readFileSync(0, "utf8"));
const { browser, fetched, state, origin, close } = await openBrowser({ executable, env, roots: { "/": `${site}/` } });

async function visit(page) {
  await page.waitForFunction(() => document.body.dataset.state === "ready", null, { timeout: 60_000 });
  const found = [];
  for (const { task, text } of questions) {
    await page.fill("#input", text);
    await page.waitForTimeout(350); // the page waits for the end of typing
    await page.selectOption("#task", task);
    await page.waitForFunction((task) => document.body.dataset.answered === task, task, { timeout: 120_000 });
    found.push(await page.evaluate(() => ({
      labels: [...document.querySelectorAll("#labels .row")].map((row) => row.dataset.label),
      text: document.getElementById("text").textContent,
      figures: document.getElementById("figures").textContent,
    })));
  }
  return { found, status: await page.textContent("#status") };
}

try {
  const page = await browser.newPage();
  page.on("pageerror", (error) => console.error(error));
  page.on("requestfailed", (request) => console.error("failed:", request.url()));
  await page.goto(`${origin}/`);
  const first = await visit(page);
  await page.evaluate(() => navigator.serviceWorker.ready);
  const firstFetched = [...fetched];
  fetched.length = 0;
  await page.reload();
  const second = await visit(page);
  const secondFetched = [...fetched];
  state.serving = false;
  await page.reload();
  const offline = await visit(page);
  process.stdout.write(JSON.stringify({ first, firstFetched, second, secondFetched, offline }) + "\n");
} finally {
  await close();
}
process.exit(0);
