// The images that go with the next message: chosen, pasted, or dropped onto the conversation.

import { byId, el, iconButton, setText } from "./dom.js";
import { readImage } from "./images.js";

export class Attachments {
  constructor() {
    this._images = [];
    this._allowed = false; // until the server says that its model reads images
    this._reading = Promise.resolve(); // ends when the files given so far are read
    this._list = byId("attached");
    this._error = byId("attach-error");
    this._prepare();
  }

  /** Say whether the model reads images. */
  allow(allowed) {
    this._allowed = allowed;
    byId("attach").hidden = !allowed;
  }

  /** Wait for the files that are being read; false if one of them cannot be. */
  async ready() {
    const told = this._error.textContent;
    await this._reading;
    return this._error.textContent === told;
  }

  get images() {
    return this._images;
  }

  /** Return the images, which then go with no further message. */
  take() {
    const images = this._images;
    this._images = [];
    this._tell("");
    this._draw();
    return images;
  }

  _prepare() {
    const [files, zone, composer] = [byId("image-files"), byId("chat-view"), byId("composer")];
    byId("attach").addEventListener("click", () => files.click());
    files.addEventListener("change", () => {
      this._add([...files.files]);
      files.value = ""; // so that the same file can be chosen again
      byId("input").focus();
    });
    byId("input").addEventListener("paste", (event) => {
      const { files: pasted, types } = event.clipboardData;
      // Cells of a spreadsheet come as text and as their picture: they are text.
      if (!pasted.length || ["text/plain", "text/html"].every((type) => types.includes(type))) return;
      event.preventDefault();
      this._add([...pasted]);
    });
    const over = (event) => event.dataTransfer?.types.includes("Files");
    zone.addEventListener("dragover", (event) => {
      if (!over(event)) return;
      event.preventDefault();
      composer.classList.add("drop");
    });
    zone.addEventListener("dragleave", (event) => {
      if (!zone.contains(event.relatedTarget)) composer.classList.remove("drop");
    });
    zone.addEventListener("drop", (event) => {
      composer.classList.remove("drop");
      if (!over(event)) return;
      event.preventDefault();
      this._add([...event.dataTransfer.files]);
    });
  }

  _add(files) {
    this._tell(this._allowed ? "" : "This model reads text only.");
    if (this._allowed) this._reading = this._read(files, this._reading);
  }

  /** Read files after those before, one after the other: they stay in order, and large ones do not meet in memory. */
  async _read(files, before) {
    await before;
    for (const file of files) {
      try {
        this._images.push(await readImage(file));
        this._draw();
      } catch (error) {
        this._tell(error.message);
      }
    }
  }

  _tell(why) {
    setText(this._error, why);
    this._error.hidden = !why;
  }

  _draw() {
    const items = this._images.map((image) => {
      const remove = iconButton("i-remove", `Remove “${image.name}”`, () => {
        this._images = this._images.filter((each) => each !== image);
        this._draw();
        byId("input").focus();
      });
      return el("li", {}, el("img", { src: image.url, alt: image.name, title: image.name }), remove);
    });
    this._list.replaceChildren(...items);
    this._list.hidden = !items.length;
  }
}
