// Keeps the page itself for visits without network; edgeprompt keeps the weights. build.mjs fills in the list.
const version = "VERSION";
const files = ["./"];

self.addEventListener("install", (event) => {
  event.waitUntil(caches.open(`page-${version}`).then((cache) => cache.addAll(files)).then(() => self.skipWaiting()));
});
self.addEventListener("activate", (event) => {
  const old = caches.keys().then((names) => names.filter((name) => name.startsWith("page-") && name !== `page-${version}`));
  event.waitUntil(old.then((names) => Promise.all(names.map((name) => caches.delete(name)))).then(() => self.clients.claim()));
});
self.addEventListener("fetch", (event) => {
  event.respondWith(
    caches.open(`page-${version}`).then((cache) => cache.match(event.request)).then((found) => found ?? fetch(event.request)),
  );
});
