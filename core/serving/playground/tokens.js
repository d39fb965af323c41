// The tokens of an answer, coloured by how likely each was, with its alternatives on demand.

import { el, formatNumber } from "./dom.js";

const percent = (logprob) => {
  const p = Math.exp(logprob) * 100;
  return `${formatNumber(p, p < 10 ? 1 : 0)} %`;
};
const grade = (p) => (p >= 0.6 ? "high" : p >= 0.2 ? "mid" : "low");
const visible = (text) => (text === "" ? "∅" : text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣"));

// Both APIs' log-probabilities in one form: [{ text, logprob, top: [{ text, logprob }] }].
export function readLogprobs(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((one) => ({
      text: one.token, logprob: one.logprob,
      top: one.top_logprobs.map((other) => ({ text: other.token, logprob: other.logprob })),
    }));
  }
  return (logprobs.tokens || []).map((text, index) => ({
    text, logprob: logprobs.token_logprobs[index],
    top: Object.entries((logprobs.top_logprobs || [])[index] || {}).map(([name, logprob]) => ({ text: name, logprob })),
  }));
}

export class TokenView {
  constructor() {
    this.tokens = [];
    this.text = el("div", { class: "text", role: "group", "aria-label": "Tokens of the answer: arrow keys move, Enter shows alternatives" });
    this.detail = el("div", { class: "detail", role: "status", hidden: true });
    this.legend = el("p", { class: "legend" }, "Probability:",
      el("span", { class: "token", "data-p": "high" }, "60 % and more"),
      el("span", { class: "token", "data-p": "mid" }, "20 to 60 %"),
      el("span", { class: "token", "data-p": "low" }, "less than 20 %"));
    this.text.addEventListener("click", (event) => this.#choose(event.target.closest(".token")));
    this.text.addEventListener("keydown", (event) => this.#key(event));
  }

  add(tokens) {
    for (const token of tokens) {
      const node = el("span", {
        class: "token", role: "button", "aria-pressed": "false", "data-p": grade(Math.exp(token.logprob)),
        tabindex: this.tokens.length ? "-1" : "0", "data-index": this.tokens.length,
        "aria-label": `${visible(token.text)}, ${percent(token.logprob)}`,
      }, token.text);
      this.tokens.push({ ...token, node });
      this.text.append(node);
    }
  }

  #key(event) {
    const here = Number(event.target.dataset?.index ?? -1);
    if (here < 0) return;
    const moves = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: this.tokens.length - 1 };
    if (event.key in moves) {
      event.preventDefault();
      const next = this.tokens[Math.min(Math.max(moves[event.key], 0), this.tokens.length - 1)];
      this.tokens[here].node.tabIndex = -1;
      next.node.tabIndex = 0;
      next.node.focus();
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.#choose(event.target);
    } else if (event.key === "Escape") this.#choose(null);
  }

  #choose(node) {
    for (const token of this.tokens) token.node.setAttribute("aria-pressed", String(token.node === node));
    this.detail.hidden = !node;
    if (!node) return;
    const token = this.tokens[Number(node.dataset.index)];
    const others = token.top.filter((other) => other.text !== token.text);
    const rows = [{ ...token, chosen: true }, ...others].sort((a, b) => b.logprob - a.logprob);
    this.detail.replaceChildren(
      el("h4", {}, `Token ${Number(node.dataset.index) + 1}: what could have stood here`),
      el("ol", {}, ...rows.map((row) => this.#row(row))));
    this.detail.scrollIntoView({ block: "nearest" });
  }

  #row(row) {
    const bar = el("i");
    bar.style.width = `${Math.exp(row.logprob) * 100}%`;
    return el("li", { class: row.chosen ? "chosen" : false },
      el("code", {}, visible(row.text)), el("span", { class: "track", "aria-hidden": "true" }, bar),
      el("span", { class: "num" }, percent(row.logprob)));
  }
}
