// Puts the page together.

import { Chat } from "./chat.js";
import { $ } from "./dom.js";
import { ServerView } from "./server.js";
import { chooseMode, setUpSettings } from "./settings.js";

const TABS = ["chat", "server"];

function showTab(name, { focus = false } = {}) {
  for (const one of TABS) {
    const isChosen = one === name;
    $(`tab-${one}`).setAttribute("aria-selected", String(isChosen));
    $(`tab-${one}`).tabIndex = isChosen ? 0 : -1;
    $(`view-${one}`).hidden = !isChosen;
  }
  if (focus) $(`tab-${name}`).focus();
  history.replaceState(null, "", name === "chat" ? location.pathname : `#${name}`);
}

for (const name of TABS) {
  $(`tab-${name}`).addEventListener("click", () => showTab(name));
  $(`tab-${name}`).addEventListener("keydown", (event) => {
    const moves = { ArrowRight: 1, ArrowLeft: TABS.length - 1 };
    if (event.key in moves) showTab(TABS[(TABS.indexOf(name) + moves[event.key]) % TABS.length], { focus: true });
  });
}

const chat = new Chat();
let isFirst = true;
const server = new ServerView((facts, error) => {
  $("state-dot").dataset.state = facts ? facts.state : "gone";
  $("model-name").textContent = facts
    ? `${facts.model.name} on ${facts.device.name || facts.device.backend}${facts.state === "ready" ? "" : `, ${facts.state}`}`
    : error.status === 401 ? "needs an API key" : "not reachable";
  if (error?.status === 401) document.querySelector(".key").open = true;
  if (facts && isFirst) {
    isFirst = false;
    if (!facts.model.has_chat_template) chooseMode("completion");
  }
});
setUpSettings({ onMode: (mode) => chat.showMode(mode), onKey: () => server.refresh() });
if (location.hash === "#server") showTab("server");
