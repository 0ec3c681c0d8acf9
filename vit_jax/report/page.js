// Draws the figures, and lets the reader zoom, choose runs and sort. All data are in #data.
const data = JSON.parse(document.getElementById("data").textContent);
const css = getComputedStyle(document.documentElement);
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const COLOURS = 8;
// Over paper of either colour; nothing at all is told from little.
const HEAT = [[0, "rgba(74,152,210,0)"], [1e-9, "rgba(74,152,210,0.18)"], [1, "rgba(74,152,210,0.85)"]];
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const token = (name) => css.getPropertyValue(name).trim();
// Runs beyond the palette get other dashes too.
const colour = (run) => token(`--run-${run % COLOURS}`);
const dash = (run, variant) => DASHES[(variant + Math.floor(run / COLOURS)) % DASHES.length];

function trace(values) {
  const { run = 0, variant = 0, role = "curve" } = values.meta ?? {};
  if (role === "reference") return { ...values, line: { color: token("--quiet"), width: 1, dash: "dot" } };
  if (role === "heat")
    return { ...values, showscale: false, colorscale: HEAT };
  if (role === "bar") return { ...values, marker: { color: colour(run) } };
  return {
    ...values,
    line: { color: colour(run), width: role === "point" ? 1 : 1.8, dash: dash(run, variant) },
    marker: { size: role === "point" ? 8 : 5, color: colour(run), line: { width: 0 }, ...values.marker },
    ...(values.error_x ? { error_x: { ...values.error_x, color: colour(run) } } : {}),
    ...(values.error_y ? { error_y: { ...values.error_y, color: colour(run) } } : {}),
  };
}

function layout(figure) {
  const several = new Set(figure.data.map((one) => one.meta?.variant ?? 0)).size > 1;
  const axis = (given = {}) => ({
    ...{ gridcolor: token("--line"), zeroline: false, ticks: "", ticklabelstandoff: 5, automargin: true },
    ...given,
    title: { standoff: 8, ...given.title, font: { size: 12 } },
  });
  const known = figure.layout ?? {};
  return {
    ...known,
    xaxis: axis(known.xaxis),
    yaxis: axis(known.yaxis),
    margin: { l: 46, r: 12, t: 10, b: 38 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12 },
    showlegend: several,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } },
    hovermode: figure.group ? "x" : "closest",
    hoverlabel: { font: { size: 12 }, namelength: 40 },
    bargap: 0.35,
    dragmode: "zoom",
  };
}

const CONFIG = {
  responsive: true,
  displaylogo: false,
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
};

// Paper is narrower than the screen: figures are drawn anew in its size, and back.
const PAPER = {  // pixels at 96 an inch
  wide: [690, 0], square: [420, 380], "wide square": [640, 620], usual: [340, 205],
};
function forPaper() {
  for (const [name, figure] of Object.entries(data.figures)) {
    const plot = document.getElementById(name), kind = plot.closest("figure").className;
    const [width, height] = PAPER[kind] ?? PAPER.usual;
    Plotly.relayout(plot, { width, height: figure.rows || !height ? plot.clientHeight : height });
  }
}
function forScreen() {
  for (const name of Object.keys(data.figures)) {
    Plotly.relayout(name, { width: null, height: null, autosize: true });
  }
}

// Whatever the size, print scales a drawing to the column it is in.
function scalable(plot) {
  for (const svg of all("svg.main-svg", plot)) {
    svg.setAttribute("viewBox", `0 0 ${plot._fullLayout.width} ${plot._fullLayout.height}`);
  }
}

// A zoom along the steps applies to every figure that shows them.
function zoomTogether(name, figure, change) {
  const range = change["xaxis.range[0]"] !== undefined
    ? [change["xaxis.range[0]"], change["xaxis.range[1]"]]
    : change["xaxis.range"];
  if (!range && !change["xaxis.autorange"]) return;
  for (const [other, its] of Object.entries(data.figures)) {
    if (other === name || its.group !== figure.group) continue;
    const plot = document.getElementById(other), axis = plot._fullLayout.xaxis;
    const same = range ? axis.range[0] === range[0] && axis.range[1] === range[1] : axis.autorange;
    if (!same) {
      Plotly.relayout(plot, range
        ? { "xaxis.range": [...range], "xaxis.autorange": false }
        : { "xaxis.autorange": true });
    }
  }
}

async function draw() {
  for (const [name, figure] of Object.entries(data.figures)) {
    const plot = document.getElementById(name);
    await Plotly.newPlot(plot, figure.data.map(trace), layout(figure), CONFIG);
    plot.on("plotly_afterplot", () => scalable(plot));
    scalable(plot);
    if (figure.group) plot.on("plotly_relayout", (change) => zoomTogether(name, figure, change));
  }
}

function chooseRuns() {
  for (const swatch of all(".swatch")) swatch.style.background = colour(+swatch.dataset.run);
  const boxes = all("input[data-run]");
  const show = () => {
    const hidden = new Set(boxes.filter((box) => !box.checked).map((box) => +box.dataset.run));
    for (const [name, figure] of Object.entries(data.figures)) {
      Plotly.restyle(name, { visible: figure.data.map((one) => !hidden.has(one.meta?.run)) });
    }
  };
  for (const box of boxes) box.addEventListener("change", show);
  for (const button of all("button[data-runs]")) {
    button.addEventListener("click", () => {
      for (const box of boxes) box.checked = button.dataset.runs === "all";
      show();
    });
  }
}

async function sortTables() {
  const source = document.getElementById("datatables").textContent;
  const { default: DataTable } = await import(`data:text/javascript;base64,${source}`);
  for (const table of all("table.sortable")) {
    new DataTable(table, {
      paging: false, info: false, searching: false, autoWidth: false, order: [], layout: {},
    });
  }
}

chooseRuns();
await Promise.all([draw(), sortTables()]);
addEventListener("beforeprint", forPaper);
addEventListener("afterprint", forScreen);
document.documentElement.dataset.ready = "";
