// Keeps a page fresh. The server makes all HTML; this only swaps in its newer version, so the
// escaping is done in one place. Without scripts the pages work, they just stand still.
"use strict";

const RELOAD_PAUSE_MS = 700; // events come in bursts: one reload for all of them
const LIST_PERIOD_MS = 4000;
let reloadTimer = null;

async function reload() {
  reloadTimer = null;
  let text;
  try {
    const response = await fetch(location.href, { headers: { Accept: "text/html" } });
    if (!response.ok) return;
    text = await response.text();
  } catch {
    return; // the server is away; the stream or the next period tries again
  }
  const fresh = new DOMParser().parseFromString(text, "text/html").getElementById("content");
  const old = document.getElementById("content");
  if (!fresh || !old) return;
  const open = [...old.querySelectorAll("details")].map((details) => details.open);
  fresh.querySelectorAll("details").forEach((details, index) => (details.open = open[index] ?? false));
  const now = fresh.querySelector("#now");
  if (now) now.textContent = old.querySelector("#now")?.textContent ?? "";
  keepImage(old, fresh);
  old.replaceWith(document.adoptNode(fresh));
}

// The same picture is moved over, not loaded again: no flicker.
function keepImage(old, fresh) {
  const before = old.querySelector("picture");
  const after = fresh.querySelector("picture");
  if (before && after && before.outerHTML === after.outerHTML) after.replaceWith(before);
}

function reloadSoon() {
  if (reloadTimer === null) reloadTimer = setTimeout(reload, RELOAD_PAUSE_MS);
}

function sayProgress(event) {
  const data = JSON.parse(event.data).data;
  const now = document.getElementById("now");
  if (!now) return;
  const share = data.total ? ` ${data.done} of ${data.total}` : "";
  now.textContent = `${data.unit_id}: ${data.phase}${share}`;
}

function quiet() {
  const now = document.getElementById("now");
  if (now) now.textContent = "";
}

function followJob(url) {
  const source = new EventSource(url);
  source.addEventListener("unit.finished", quiet);
  source.addEventListener("unit.progress", sayProgress);
  for (const type of ["job.queued", "job.running", "unit.started", "unit.retrying", "unit.finished"]) {
    source.addEventListener(type, reloadSoon);
  }
  for (const type of ["job.succeeded", "job.failed", "job.cancelled"]) {
    source.addEventListener(type, () => {
      source.close();
      quiet();
      reloadSoon();
    });
  }
}

const content = document.getElementById("content");
if (content?.dataset.refresh === "job") followJob(content.dataset.events);
if (content?.dataset.refresh === "list") {
  setInterval(() => { if (!document.hidden) reload(); }, LIST_PERIOD_MS);
}
