// How often each expert is chosen: a row for each layer, a column for each expert.
//
// The scale is relative: 1 is what every expert of a layer would get if all were chosen equally often.

import { formatCount, formatShare } from "./format.js";

const HOTTEST = 8; // times the even share, and more
const FRAME_PX = 3; // around the map, for what marks the focus
const CELL_PX = { width: [1, 26], height: [6, 22] }; // least and most

export class HeatMap {
  /** `scale`: elements whose background colours are the steps from cold to hot; `told`: says what is pointed at. */
  constructor(canvas, scale, told) {
    this._canvas = canvas;
    this._scale = scale;
    this._told = told;
    this._data = null; // {layers, experts, counts, hot, sums}
    this._at = null; // {row, column} that is pointed at
    canvas.addEventListener("pointermove", (event) => this._point(this._cell(event)));
    canvas.addEventListener("pointerleave", () => this._point(null));
    canvas.addEventListener("keydown", (event) => this._step(event));
    canvas.addEventListener("blur", () => this._point(null));
    new ResizeObserver(() => this._draw()).observe(canvas.parentElement);
  }

  /** Show counts. `layers`: their numbers; `counts`, `hot`: lists for each of them, of all experts and of hot ones. */
  update({ layers, counts, hot }) {
    const sums = counts.map((row) => row.reduce((sum, count) => sum + count, 0));
    this._data = { layers, counts, hot, sums, experts: counts[0]?.length ?? 0 };
    this._draw();
    this._told.ariaLive = "off"; // what changes by itself is not read out
    this._tell();
  }

  _draw() {
    const room = this._canvas.parentElement.clientWidth - 2 * FRAME_PX;
    if (!this._data?.experts || room <= 0) return;
    const { counts, experts, layers } = this._data;
    const width = clamp(room / experts, CELL_PX.width);
    const height = clamp(Math.max(width * 0.7, 280 / layers.length), CELL_PX.height);
    const pixels = devicePixelRatio || 1;
    this._size = { width, height };
    Object.assign(this._canvas, { width: experts * width * pixels, height: layers.length * height * pixels });
    this._canvas.style.width = `${experts * width}px`;
    this._canvas.style.height = `${layers.length * height}px`;
    const context = this._canvas.getContext("2d");
    context.scale(pixels, pixels);
    context.imageSmoothingEnabled = false;
    context.drawImage(this._image(counts, experts), 0, 0, experts * width, layers.length * height);
    if (width >= 5) this._grid(context, experts, layers.length);
    if (this._at) this._frame(context);
  }

  /** Paint a pixel for each expert. */
  _image(counts, experts) {
    const colours = [...this._scale.children].map((step) => rgb(getComputedStyle(step).backgroundColor));
    const image = new ImageData(experts, counts.length);
    counts.forEach((row, layer) => {
      row.forEach((_, expert) => {
        image.data.set([...blend(colours, heat(this._timesEven(layer, expert))), 255], 4 * (layer * experts + expert));
      });
    });
    const canvas = new OffscreenCanvas(experts, counts.length);
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }

  _grid(context, experts, rows) {
    const { width, height } = this._size;
    context.strokeStyle = getComputedStyle(this._canvas).backgroundColor;
    context.beginPath();
    for (let column = 1; column < experts; column += 1) {
      context.moveTo(column * width, 0);
      context.lineTo(column * width, rows * height);
    }
    for (let row = 1; row < rows; row += 1) {
      context.moveTo(0, row * height);
      context.lineTo(experts * width, row * height);
    }
    context.stroke();
  }

  _frame(context) {
    const { width, height } = this._size;
    context.strokeStyle = getComputedStyle(this._canvas).color;
    context.lineWidth = 2;
    context.strokeRect(this._at.column * width - 1, this._at.row * height - 1, width + 2, height + 2);
  }

  _timesEven(row, column) {
    const { counts, sums, experts } = this._data;
    return sums[row] ? (counts[row][column] * experts) / sums[row] : 0;
  }

  _cell({ offsetX, offsetY }) {
    const { layers, experts } = this._data ?? { layers: [], experts: 0 };
    if (!experts) return null;
    const { width, height } = this._size;
    const at = { row: Math.floor(offsetY / height), column: Math.floor(offsetX / width) };
    return at.row >= 0 && at.row < layers.length && at.column >= 0 && at.column < experts ? at : null;
  }

  _step(event) {
    const [down, right] =
      { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [];
    if (down === undefined || !this._data?.experts) return;
    event.preventDefault();
    this._told.ariaLive = "polite";
    const { row, column } = this._at ?? { row: -down, column: -right };
    const last = { row: this._data.layers.length - 1, column: this._data.experts - 1 };
    this._point({ row: clamp(row + down, [0, last.row]), column: clamp(column + right, [0, last.column]) });
  }

  _point(at) {
    this._at = at;
    this._draw();
    this._tell();
  }

  _tell() {
    if (!this._data) return;
    const { layers, counts, hot, sums } = this._data;
    if (!this._at) {
      const choices = sums.reduce((sum, each) => sum + each, 0);
      this._told.textContent = `${formatCount(choices)} choices in ${layers.length} layers`;
      return;
    }
    const { row, column } = this._at;
    const count = counts[row][column];
    const share = sums[row] ? count / sums[row] : 0;
    const even = this._timesEven(row, column).toFixed(1);
    this._told.textContent =
      `Layer ${layers[row]}, expert ${column}: ${formatShare(share)} of the layer's choices ` +
      `(${formatCount(count)}), ${even} times the even share${hot[row].includes(column) ? ", on the accelerator" : ""}`;
  }
}

/** Return where a multiple of the even share lies between cold, 0, and hot, 1. */
const heat = (times) => Math.min(1, Math.log2(1 + times) / Math.log2(1 + HOTTEST));

const clamp = (value, [least, most]) => Math.min(most, Math.max(least, value));

const rgb = (colour) =>
  colour
    .match(/[\d.]+/g)
    .slice(0, 3)
    .map(Number);

function blend(colours, level) {
  const place = level * (colours.length - 1);
  const low = Math.min(colours.length - 2, Math.floor(place));
  return colours[low].map((value, index) => value + (colours[low + 1][index] - value) * (place - low));
}
