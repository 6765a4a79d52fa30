"use strict";
// Shows the time line that is in the element "data". Texts get into the page by textContent only.
(() => {
  const PAGE = 500; // rows at once: a browser that has more of them is slow
  const PRINTED = 20000;
  const LONGEST_WAIT = 5000; // milliseconds
  const data = JSON.parse(document.getElementById("data").textContent);
  const items = data.items.map((
    [number, kind, at, offset, step, verdict, line, details, tool, unexplained, conversation, depth],
  ) => ({
    number, kind: data.kinds[kind], at, offset, step, verdict: data.verdicts[verdict], line, details,
    tool, unexplained: unexplained === 1, conversation, depth,
  }));
  const byId = (id) => document.getElementById(id);
  const list = byId("items"), seek = byId("seek"), status = byId("status"), play = byId("play");
  const state = { found: items, at: 0, page: 0, playing: null };

  function element(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function clock(seconds) {
    const whole = Math.max(0, Math.round(seconds * 1000));
    const two = (value) => String(value).padStart(2, "0");
    const minutes = Math.floor(whole / 60000) % 60, second = Math.floor(whole / 1000) % 60;
    return `${Math.floor(whole / 3600000)}:${two(minutes)}:${two(second)}.${String(whole % 1000).padStart(3, "0")}`;
  }

  function wall(at) {
    const date = new Date(at * 1000);
    return Number.isNaN(date.getTime()) ? "" : date.toISOString();
  }

  function row(item, index) {
    const entry = element("li", `depth${item.depth}${item.unexplained ? " unexplained" : ""}`), box = element("details"), head = element("summary");
    const when = element("time", "when", clock(item.offset));
    when.dateTime = when.title = wall(item.at);
    head.append(
      when,
      element("span", "number", `#${item.number}`),
      element("span", "kind", item.kind),
      element("span", item.verdict || "none", item.verdict || ""),
      element("bdi", "", item.line),
    );
    if (item.conversation && item.depth && item.step) {
      head.append(element("span", "step", `step ${item.step}${item.tool ? `, ${item.tool}` : ""}`));
    }
    box.append(head);
    box.addEventListener("toggle", () => {
      if (box.open && box.childElementCount === 1) box.append(details(item));
    });
    head.addEventListener("click", () => choose(index, false));
    entry.append(box);
    return entry;
  }

  function details(item) {
    const found = element("dl");
    const facts = [["time", wall(item.at)], ["step", item.step ? String(item.step) : ""],
      ["conversation", item.conversation], ...item.details];
    for (const [name, text] of facts) {
      if (!text) continue;
      const value = element("dd");
      value.append(element("pre", "", text));
      found.append(element("dt", "", name), value);
    }
    return found;
  }

  function draw(first, last) {
    list.replaceChildren(...state.found.slice(first, last).map((item, index) => row(item, first + index)));
    mark(false);
  }

  function mark(scroll) {
    for (const old of list.querySelectorAll("[aria-current]")) old.removeAttribute("aria-current");
    const entry = list.children[state.at - state.page * PAGE];
    if (entry) {
      entry.setAttribute("aria-current", "true");
      if (scroll) entry.scrollIntoView({ block: "center" });
    }
    const pages = Math.max(1, Math.ceil(state.found.length / PAGE));
    byId("page").textContent = `page ${state.page + 1} of ${pages}`;
    seek.max = String(Math.max(0, state.found.length - 1));
    seek.value = String(state.at);
    const item = state.found[state.at];
    seek.setAttribute("aria-valuetext", item ? clock(item.offset) : "");
    status.textContent = item
      ? `${clock(item.offset)}, record ${item.number}, ${state.at + 1} of ${state.found.length} shown (${items.length} in all)`
      : `nothing matches (${items.length} in all)`;
  }

  function choose(index, scroll = true) {
    state.at = Math.min(Math.max(0, index), Math.max(0, state.found.length - 1));
    const page = Math.floor(state.at / PAGE);
    if (page !== state.page) {
      state.page = page;
      draw(page * PAGE, (page + 1) * PAGE);
    }
    mark(scroll);
  }

  function filter() {
    stop();
    const current = state.found[state.at];
    const on = (name) => new Set([...document.querySelectorAll(`input[name="${name}"]:checked`)].map((box) => box.value));
    const kinds = on("kind"), verdicts = on("verdict"), text = byId("search").value.toLocaleLowerCase();
    const only = byId("unexplained").checked;
    const has = (part) => part.toLocaleLowerCase().includes(text);
    state.found = items.filter((item) => kinds.has(item.kind) && verdicts.has(item.verdict || "none")
      && (!only || item.unexplained)
      && (!text || has(item.line) || item.details.some((detail) => has(detail[1]))));
    const next = current ? state.found.findIndex((item) => item.number >= current.number) : 0;
    state.at = next < 0 ? Math.max(0, state.found.length - 1) : next;
    state.page = Math.floor(state.at / PAGE);
    draw(state.page * PAGE, (state.page + 1) * PAGE);
  }

  function stop() {
    clearTimeout(state.playing);
    state.playing = null;
    play.textContent = "Play";
    status.setAttribute("aria-live", "polite");
  }

  function wait() {
    const now = state.found[state.at], next = state.found[state.at + 1];
    if (!next) return stop();
    const pause = Math.min(Math.max(0, next.offset - now.offset) * 1000 / Number(byId("speed").value), LONGEST_WAIT);
    state.playing = setTimeout(() => { choose(state.at + 1); wait(); }, pause);
  }

  function toggle() {
    if (state.playing !== null) return stop();
    play.textContent = "Pause";
    status.setAttribute("aria-live", "off"); // else a screen reader reads nothing but the time
    wait();
  }

  function step(by) {
    stop();
    choose(state.at + by);
  }

  function skip(seconds) {
    const now = state.found[state.at];
    if (!now) return;
    stop();
    const wanted = now.offset + seconds;
    const found = state.found.findIndex((item) => item.offset >= wanted);
    choose(found < 0 ? state.found.length - 1 : found);
  }

  function go() {
    stop();
    const said = byId("go").value.trim();
    const number = /^#?(\d+)$/.exec(said), of = /^step\s+(\d+)$/i.exec(said);
    const tool = /^tool\s+(\S+)$/i.exec(said);
    const time = /^(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)$/.exec(said), seconds = /^(\d+(?:\.\d+)?)s$/i.exec(said);
    let is = null;
    if (number) is = (item) => item.number >= Number(number[1]);
    else if (tool) is = (item) => item.tool === tool[1];
    else if (/^unexplained$/i.test(said)) is = (item, index) => item.unexplained && index > state.at;
    else if (of) is = (item) => item.step === Number(of[1]);
    else if (seconds) is = (item) => item.offset >= Number(seconds[1]);
    else if (time) {
      const wanted = Number(time[1] || 0) * 3600 + Number(time[2]) * 60 + Number(time[3]);
      is = (item) => item.offset >= wanted;
    }
    const found = is ? state.found.findIndex(is) : -1;
    if (found >= 0) choose(found);
    else status.textContent = "there is no such place among what is shown";
  }

  for (const button of document.querySelectorAll("button.place")) {
    button.addEventListener("click", () => {
      stop();
      const found = state.found.findIndex((item) => item.number >= Number(button.dataset.number));
      if (found >= 0) choose(found);
    });
  }
  byId("filter").addEventListener("submit", (event) => event.preventDefault());
  for (const box of document.querySelectorAll('input[type="checkbox"]')) box.addEventListener("change", filter);
  byId("search").addEventListener("input", filter);
  byId("go").addEventListener("keydown", (event) => { if (event.key === "Enter") go(); });
  seek.addEventListener("input", () => { stop(); choose(Number(seek.value)); });
  play.addEventListener("click", toggle);
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("earlier").addEventListener("click", () => choose((state.page - 1) * PAGE));
  byId("later").addEventListener("click", () => choose((state.page + 1) * PAGE));
  const keys = {
    " ": toggle, n: () => step(1), p: () => step(-1), "/": () => byId("search").focus(), g: () => byId("go").focus(),
    ArrowLeft: () => skip(-10), ArrowRight: () => skip(10),
  };
  document.addEventListener("keydown", (event) => {
    const where = event.target.localName;
    if (event.ctrlKey || event.altKey || event.metaKey || ["input", "select", "button"].includes(where)) return;
    if (where === "summary" && event.key === " ") return;
    const action = keys[event.key];
    if (action) {
      event.preventDefault();
      action();
    }
  });
  addEventListener("beforeprint", () => draw(0, PRINTED));
  addEventListener("afterprint", () => draw(state.page * PAGE, (state.page + 1) * PAGE));
  filter();
})();
