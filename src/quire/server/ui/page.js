// The page: what its parts share. Owns: the header, the theme, the key's dialog and the rhythm of polling.

import { get, hasKey, onLocked, setKey } from "./api.js";
import { Chat } from "./chat.js";
import { Curves } from "./curves.js";
import { Load } from "./load.js";
import { BlockMap } from "./map.js";

const $ = (id) => document.getElementById(id);
const STATS_MS = 1000;
const BUSY_MS = 250;
const IDLE_MS = 1000;
const RETRY_MS = 3000;

// -- theme -----------------------------------------------------------------------------------------------------------

const THEME = "quire.theme";
const dark = matchMedia("(prefers-color-scheme: dark)");

function paint() {
  const chosen = $("theme").value;
  document.documentElement.dataset.theme = chosen === "auto" ? (dark.matches ? "dark" : "light") : chosen;
  map.repaint();
  curves.repaint();
}

// -- the key ---------------------------------------------------------------------------------------------------------

const dialog = $("key-dialog");
let locked = false;

function askForKey() {
  locked = true;
  const trouble = $("key-trouble");
  trouble.hidden = !hasKey();
  trouble.textContent = "The server does not know this key.";
  show("wait", "needs a key");
  if (!dialog.open) dialog.showModal();
}

$("key").addEventListener("click", () => {
  $("key-trouble").hidden = true;
  dialog.showModal();
});
$("key-cancel").addEventListener("click", () => dialog.close());
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key-field").value.trim());
  locked = false;
  dialog.close();
});
onLocked(() => {
  if (!locked) askForKey();
});

// -- the engine ------------------------------------------------------------------------------------------------------

const map = new BlockMap();
const curves = new Curves();
const chat = new Chat(map);
const load = new Load();

function show(state, text) {
  const status = $("status");
  if (status.textContent !== text) status.textContent = text;
  status.dataset.state = state;
}

async function readStats() {
  const stats = await get("engine/stats");
  const waiting = stats.status === "starting" || stats.status === "shutting down";
  show(stats.status === "ok" ? "ok" : waiting ? "wait" : "bad", stats.status === "ok" ? "running" : stats.status);
  $("model").textContent = `${stats.model}, ${stats.max_model_len.toLocaleString("en")} tokens`;
  $("version").textContent = stats.version;
  document.title = `quire: ${stats.model}`;
  chat.model = load.model = stats.model;
  load.most = stats.max_model_len;
  curves.take(stats);
  return STATS_MS;
}

async function readMap() {
  const blocks = await get(`engine/blocks?${map.query}`);
  map.take(blocks);
  return blocks.requests.length ? BUSY_MS : IDLE_MS;
}

/** Calls `read` again and again, after as long as it says; not while nobody looks, and not without the right key. */
async function repeat(read, failed) {
  for (;;) {
    let pause = RETRY_MS;
    if (!locked && !document.hidden) {
      try {
        pause = await read();
      } catch (error) {
        if (!locked) failed(error);
      }
    } else {
      pause = STATS_MS / 2;
    }
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
}

$("theme").value = localStorage.getItem(THEME) ?? "auto";
$("theme").addEventListener("change", () => {
  localStorage.setItem(THEME, $("theme").value);
  paint();
});
dark.addEventListener("change", paint);
paint();

repeat(readStats, (error) => show("bad", error.status ? error.message : "no connection"));
repeat(readMap, (error) => map.fail(error.status ? error.message : "no connection"));
