// The page: a chat on one side, the pipeline that answers on the other.

import { ask, key } from "./api.js";
import { Chat } from "./chat.js";
import { find, say } from "./elements.js";
import { startOptions } from "./options.js";
import { Watch } from "./watch.js";

const THEMES = { auto: ["◐", "as the system"], light: ["☀", "light"], dark: ["☾", "dark"] };
const THEME = "veilpipe-theme"; // nobody's secret: it may outlive the tab

const chat = new Chat(wantKey);
const watch = new Watch((text) => chat.hear(text), wantKey);

async function start() {
  find("change-key").hidden = !key.get();
  try {
    const { data } = await (await ask("v1/models")).json();
    chat.model = data[0].id;
    say(find("model"), chat.model);
    document.title = `${chat.model} · veilpipe`;
  } catch (error) {
    if (error.wantsKey) return wantKey(error.message);
    // The watch says so, and the server is asked again when it is back.
    setTimeout(start, 3000);
  }
  watch.look();
}

function wantKey(problem) {
  find("change-key").hidden = false;
  if (find("key-dialog").open) return;
  say(find("key-problem"), key.get() && problem ? problem : "This server wants one. It stays in this tab and is forgotten with it.");
  find("key").value = "";
  find("key-dialog").showModal();
}

function startKey() {
  find("change-key").addEventListener("click", () => wantKey(""));
  find("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key.set(find("key").value.trim());
    find("key").value = "";
    find("key-dialog").close();
    find("prompt").focus();
    start();
  });
  find("key-forget").addEventListener("click", () => {
    key.forget();
    location.reload();
  });
}

function startTheme() {
  const show = (name) => {
    document.documentElement.dataset.theme = name;
    const [glyph, words] = THEMES[name];
    say(find("theme"), glyph);
    find("theme").title = `Colours: ${words}`;
    find("theme").setAttribute("aria-label", find("theme").title);
  };
  const names = Object.keys(THEMES);
  const kept = localStorage.getItem(THEME);
  show(names.includes(kept) ? kept : "auto");
  find("theme").addEventListener("click", () => {
    const next = names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length];
    localStorage.setItem(THEME, next);
    show(next);
  });
}

function startTabs() {
  const tabs = document.querySelectorAll("button.tab");
  for (const tab of tabs) {
    tab.addEventListener("click", () => {
      document.body.dataset.view = tab.dataset.view;
      for (const each of tabs) each.setAttribute("aria-pressed", String(each === tab));
    });
  }
}

startTheme();
startTabs();
startKey();
startOptions();
start();
