"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // Tooltips: what carries data-t shows it.
  const tip = make("div");
  tip.id = "tip";
  tip.role = "tooltip";
  tip.hidden = true;
  document.body.append(tip);
  document.addEventListener("pointerover", (event) => {
    const target = event.target.closest("[data-t]");
    tip.hidden = !target;
    if (!target) return;
    tip.textContent = target.dataset.t;
    const box = target.getBoundingClientRect();
    const left = Math.min(box.left + 12, innerWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 6;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 6}px`;
  });
  document.addEventListener("scroll", () => { tip.hidden = true; }, true);
  const { arms, tokens, features: packed } = JSON.parse(byId("data").textContent);
  const features = packed.map(([arm, index, density, exponent, contexts, promotes, suppresses]) => {
    const codes = contexts.flatMap((context) => context[2]);
    const largest = codes.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    return { arm, index, density, exponent, contexts, promotes, suppresses, largest, id: `${arm}/${index}` };
  });
  const lowest = features.reduce((least, { density }) => (density > 0 ? Math.min(least, density) : least), 1);
  const decades = Math.max(1, Math.ceil(-Math.log10(lowest)));
  const onLogScale = (density) => (density > 0 ? Math.max(0.02, 1 + Math.log10(density) / decades) : 0);
  const percent = (share) => (share > 0 ? `${Number((share * 100).toPrecision(2))}%` : "0%");
  const visible = (token) => token.replace(/\r/g, "␍").replace(/\n/g, "↵").replace(/\t/g, "⇥");
  const severalArms = new Set(features.map((feature) => feature.arm)).size > 1;

  // What search looks through: the runs of tokens that the feature is active on, or all of its contexts.
  const searched = (feature, anywhere) => {
    const key = anywhere ? "whole" : "active";
    if (feature[key] === undefined) {
      feature[key] = feature.contexts.map(([ids, places]) => {
        if (anywhere) return ids.map((id) => tokens[id]).join("");
        return places.map((place, i) => (i && places[i - 1] !== place - 1 ? "\0" : "") + tokens[ids[place]]).join("");
      }).join("\0").toLowerCase();
    }
    return feature[key];
  };
  const peakOf = ([ids, places, values]) => {
    let best = 0;
    values.forEach((value, i) => { if (Math.abs(value) > Math.abs(values[best])) best = i; });
    return values.length ? { place: places[best], token: tokens[ids[places[best]]], value: values[best] } : null;
  };

  const list = byId("list"), query = byId("query"), armChoice = byId("arm"), sort = byId("sort"), anywhere = byId("anywhere");
  const more = byId("more"), panel = byId("feature");
  const PAGE = 60;
  const descending = {
    density: (feature) => feature.density,
    exponent: (feature) => feature.exponent ?? -Infinity,
    "largest code": (feature) => feature.largest,
  };
  let matching = [], chosen = null;

  const row = (feature) => {
    const item = make("li"), button = make("button");
    const peak = feature.contexts.length ? peakOf(feature.contexts[0]) : null;
    button.type = "button";
    button.dataset.id = feature.id;
    const bar = make("span", `bar s${feature.arm % 8}`), fill = make("i");
    fill.style.setProperty("--share", onLogScale(feature.density));
    bar.append(fill);
    button.append(
      make("span", `number s${feature.arm % 8}`, `#${feature.index}`),
      make("span", "peak", peak ? visible(peak.token) : "-"),
      bar,
      make("span", "right", percent(feature.density)),
      make("span", "right", feature.exponent === null ? "" : `a ${feature.exponent.toFixed(2)}`),
    );
    button.setAttribute("aria-label", `Feature ${feature.index}${severalArms ? ` of ${arms[feature.arm]}` : ""}, density ` +
      `${percent(feature.density)}${feature.exponent === null ? "" : `, exponent ${feature.exponent.toFixed(2)}`}, ` +
      (peak ? `largest on ${visible(peak.token)}` : "not active"));
    if (chosen === feature) button.setAttribute("aria-current", "true");
    item.append(button);
    return item;
  };

  const showMore = () => {
    const shown = list.children.length;
    list.append(...matching.slice(shown, shown + PAGE).map(row));
    more.hidden = list.children.length >= matching.length;
  };

  const search = () => {
    const text = query.value.toLowerCase(), exact = /^\s*#(\d+)\s*$/.exec(text);
    const arm = armChoice && armChoice.value !== "" ? Number(armChoice.value) : null;
    matching = features.filter((feature) => (arm === null || feature.arm === arm) && (
      exact ? feature.index === Number(exact[1])
        : !text || String(feature.index) === text.trim() || searched(feature, anywhere.checked).includes(text)));
    const peaksHere = (feature) => feature.contexts.filter((context) => peakOf(context)?.token.toLowerCase().includes(text)).length;
    const by = sort.value === "best match" && text && !exact ? peaksHere : descending[sort.value];
    if (by) {
      const rank = new Map(matching.map((feature) => [feature, by(feature)]));
      matching.sort((a, b) => rank.get(b) - rank.get(a));
    }
    list.replaceChildren();
    showMore();
    byId("results").scrollTop = 0;
    if (matching.length && !matching.includes(chosen)) open(matching[0]);
    byId("found").textContent = `${matching.length.toLocaleString("en")} of ${features.length.toLocaleString("en")} features`;
  };

  const fact = (name, value, bar) => {
    const box = make("div"), content = make("dd", "", value);
    if (bar) content.append(bar);
    box.append(make("dt", "", name), content);
    return box;
  };
  const tokenList = (name, items) => {
    const line = make("p", "tokens", `${name} `);
    line.append(...items.map(([id, value]) => {
      const token = make("span", "", visible(tokens[id]));
      token.dataset.t = `logit ${value}`;
      return token;
    }));
    return line;
  };
  const contextLine = (feature, context) => {
    const [ids, places, values] = context;
    const line = make("p", "context"), peak = peakOf(context), code = new Map(places.map((place, i) => [place, values[i]]));
    line.append(make("b", "", peak ? String(peak.value) : "0"));
    let plain = "";
    ids.forEach((id, place) => {
      const value = code.get(place);
      if (value === undefined) { plain += visible(tokens[id]); return; }
      line.append(plain);
      plain = "";
      const mark = make("mark", value < 0 ? "negative" : "", visible(tokens[id]));
      if (place === peak.place) mark.classList.add("peak");
      mark.style.setProperty("--v", Math.max(0.12, Math.abs(value) / feature.largest).toFixed(2));
      mark.dataset.t = `${value}`;
      line.append(mark);
    });
    line.append(plain);
    return line;
  };

  const open = (feature) => {
    chosen = feature;
    for (const button of list.querySelectorAll("button")) {
      if (button.dataset.id === feature.id) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
    const facts = make("dl", "facts"), bar = make("div", `bar s${feature.arm % 8}`), fill = make("i");
    fill.style.setProperty("--share", onLogScale(feature.density));
    bar.append(fill);
    bar.dataset.t = `log scale, 1e-${decades} to 1`;
    facts.append(fact("density (log scale)", `${percent(feature.density)} of tokens`, bar));
    if (feature.exponent !== null) facts.append(fact("norm exponent a", feature.exponent.toFixed(3)));
    facts.append(fact("largest code", String(feature.largest)));
    panel.replaceChildren(make("h3", "", `Feature ${feature.index} of ${arms[feature.arm]}`), facts);
    if (feature.promotes.length) panel.append(tokenList("Promotes", feature.promotes));
    if (feature.suppresses.length) panel.append(tokenList("Suppresses", feature.suppresses));
    if (!feature.contexts.length) panel.append(make("p", "about", "Not active on any of the evaluated tokens."));
    panel.append(...feature.contexts.map((context) => contextLine(feature, context)));
  };

  const fromAddress = () => {
    const id = location.hash.startsWith("#feature/") ? location.hash.slice("#feature/".length) : null;
    const feature = id && features.find((candidate) => candidate.id === id);
    if (!feature) return false;
    open(feature);
    panel.scrollIntoView({ block: "nearest" });
    panel.focus({ preventScroll: true });
    return true;
  };

  // Arrow keys walk the results and open what they reach; Escape returns to the search.
  const step = (from, distance) => {
    const buttons = [...list.querySelectorAll("button")];
    const place = buttons.indexOf(from) + distance;
    if (place >= buttons.length - 1 && !more.hidden) showMore();
    const next = list.querySelectorAll("button")[place];
    if (next) next.focus();
    else if (place < 0) query.focus();
  };
  list.addEventListener("focusin", (event) => {
    open(features.find((feature) => feature.id === event.target.dataset.id));
  });
  list.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    open(features.find((feature) => feature.id === button.dataset.id));
    if (panel.getBoundingClientRect().top > innerHeight * 0.7) panel.scrollIntoView({ block: "start" });
  });
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const control of [query, armChoice, sort, anywhere]) control?.addEventListener("input", search);
  more.addEventListener("click", showMore);
  query.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowDown" && event.key !== "Enter") return;
    event.preventDefault();
    list.querySelector("button")?.focus();
  });
  list.addEventListener("keydown", (event) => {
    const distance = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 }[event.key];
    if (distance) step(event.target, distance);
    else if (event.key === "Escape") query.focus();
    else return;
    event.preventDefault();
  });
  addEventListener("hashchange", fromAddress);

  chosen = features.find((feature) => feature.contexts.length) ?? features[0];
  search();
  if (!fromAddress()) open(chosen);
})();
