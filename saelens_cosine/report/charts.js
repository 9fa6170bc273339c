"use strict";
// Charts are drawn by plotly when they come near the window, and all of them before the page is printed.
(() => {
  const boxes = [...document.querySelectorAll(".chart")];
  const drawn = new Set();
  const coarse = matchMedia("(pointer: coarse)").matches;
  const byId = (id) => document.getElementById(id);
  const isShown = (arm) => byId(`show${arm}`)?.checked ?? true;
  const PRINTED = {
    "--ink": "#000", "--soft": "#444", "--grid": "#ddd", "--rule": "#bbb", "--card": "#fff",
  };

  const draw = (box, width) => {
    const { data, layout } = JSON.parse(box.nextElementSibling.textContent);
    const style = getComputedStyle(document.body);
    const colour = (name) => (width && PRINTED[name]) || style.getPropertyValue(name).trim();
    for (const trace of data) {
      if (trace.meta?.arm === undefined) continue;
      trace.visible = isShown(trace.meta.arm);
      if (width) continue; // on paper the colours are those of the figure
      const own = colour(`--s${trace.meta.arm % 8}`);
      for (const part of [trace.line, trace.marker, trace.error_x, trace.error_y]) {
        if (typeof part?.color === "string" && part.color !== "#999999") part.color = own;
      }
      if (trace.fillcolor) trace.fillcolor = `${own}21`; // as pale as in the figure
    }
    const axis = {
      gridcolor: colour("--grid"), zeroline: false, linecolor: colour("--rule"), tickcolor: colour("--rule"), automargin: true,
      ticks: "outside", ticklen: 4,
      title: { standoff: 8, font: { size: 12.5, color: colour("--ink") } }, exponentformat: "SI", minexponent: 3,
    };
    layout.template = { layout: {
      font: { family: style.fontFamily || "system-ui, sans-serif", size: 12, color: colour("--soft") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 8, r: 12, t: 28, b: 8 },
      hovermode: "closest", dragmode: coarse ? false : "zoom", xaxis: axis, yaxis: axis,
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--rule"), font: { color: colour("--ink"), size: 12.5 }, align: "left" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--ink") },
    } };
    layout.uirevision = "kept"; // what was zoomed stays so
    layout.autosize = !width;
    if (width) Object.assign(layout, { width, height: box.clientHeight });
    Plotly.react(box, data, layout, {
      responsive: true, displaylogo: false, displayModeBar: !width,
      // named one by one: plotly's own choice has one that hands the chart to its makers
      modeBarButtons: [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]],
    });
    if (drawn.has(box)) return;
    drawn.add(box);
    // a point that stands for a feature opens it in the browser, where there is one
    if (!byId("feature") || !data.some((trace) => trace.customdata)) return;
    box.previousElementSibling.append(" Choose a point to open its feature.");
    const open = (feature) => { if (feature) location.hash = `feature/${feature}`; };
    let pointed = null, pressed = null;
    box.on("plotly_hover", ({ points }) => { pointed = points[0].customdata; });
    box.on("plotly_unhover", () => { pointed = null; });
    box.on("plotly_click", ({ points }) => open(points[0]?.customdata));
    // plotly forgets what is pointed at, and tells of no click, where the pointer trembles between pressing and releasing
    box.addEventListener("mousedown", ({ clientX, clientY }) => { pressed = { pointed, clientX, clientY }; }, true);
    box.addEventListener("click", ({ clientX, clientY }) => {
      if (pressed && Math.hypot(clientX - pressed.clientX, clientY - pressed.clientY) < 6) open(pressed.pointed);
    }, true);
  };

  const near = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) if (isIntersecting && !drawn.has(target)) draw(target);
  }, { rootMargin: "400px" });
  for (const box of boxes) { box.querySelector("noscript")?.remove(); near.observe(box); }

  document.querySelector(".legend")?.addEventListener("change", (event) => {
    const arm = Number(event.target.id.slice("show".length));
    for (const box of drawn) {
      const traces = box.data.flatMap((trace, i) => (trace.meta?.arm === arm ? [i] : []));
      if (traces.length) Plotly.restyle(box, { visible: event.target.checked }, traces);
    }
  });

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { for (const box of drawn) draw(box); });
  addEventListener("beforeprint", () => { for (const box of boxes) draw(box, 340); });
  addEventListener("afterprint", () => { for (const box of boxes) draw(box); });
})();
