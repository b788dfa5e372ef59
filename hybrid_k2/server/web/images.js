// Image files for a message: told by their first bytes, drawn anew where they are large or would have to be turned (the
// model does not turn them), and written as data URIs.

export const IMAGE_URI = /^data:image\/(png|jpeg|webp|gif);base64,/;

const MAX_BYTES = 4 * 2 ** 20;
const MAX_SIDE = 4096; // pixels; the model itself shrinks an image to some three million of them
const QUALITY = 0.9;
const HEAD_BYTES = 2 ** 16; // what a camera says of an image stands there
const ORIENTATION = 0x0112; // its tag
const BEGINNINGS = {
  "image/png": /^\x89PNG\r\n\x1a\n/,
  "image/jpeg": /^\xff\xd8\xff/,
  "image/webp": /^RIFF[^]{4}WEBP/,
  "image/gif": /^GIF8[79]a/,
};

/** Return the media type that the first bytes of a file tell, or null. */
export function imageType(bytes) {
  const text = String.fromCharCode(...bytes.subarray(0, 12));
  return Object.keys(BEGINNINGS).find((type) => BEGINNINGS[type].test(text)) ?? null;
}

/** Say whether a file, of which these are the first bytes, is shown other than it is stored: Exif's orientation. */
export function isTurned(bytes) {
  const at = new TextDecoder("latin1").decode(bytes).indexOf("Exif\0\0"); // a character for each byte
  if (at < 0) return false;
  try {
    const exif = new DataView(bytes.buffer, bytes.byteOffset + at + 6, bytes.length - at - 6);
    const little = exif.getUint16(0) === 0x4949; // "II", else "MM"
    const list = exif.getUint32(4, little);
    for (let left = exif.getUint16(list, little), entry = list + 2; left > 0; left -= 1, entry += 12) {
      if (exif.getUint16(entry, little) === ORIENTATION) return exif.getUint16(entry + 8, little) > 1;
    }
  } catch {
    // cut short
  }
  return false;
}

/** Read a file into {name, url}. Throws Error with what to tell the reader. */
export async function readImage(file) {
  const start = file.slice(0, HEAD_BYTES);
  const head = new Uint8Array(await start.arrayBuffer().catch(() => refuse(file, "it cannot be read")));
  const type = imageType(head);
  if (!type) refuse(file, "expected a PNG, JPEG, WebP or GIF image");
  const typed = file.slice(0, file.size, type); // its name may have told the browser another type
  const bitmap = await createImageBitmap(typed).catch(() => refuse(file, "the image is damaged, or too large"));
  const large = file.size > MAX_BYTES || Math.max(bitmap.width, bitmap.height) > MAX_SIDE;
  const url = await dataUri(large || isTurned(head) ? await redraw(bitmap) : typed);
  bitmap.close();
  return { name: file.name, url };
}

function refuse(file, why) {
  throw new Error(`${file.name}: ${why}.`);
}

/** Return a JPEG file of at most `most` bytes and `MAX_SIDE` pixels a side. */
export async function redraw(bitmap, most = MAX_BYTES) {
  for (let scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height)); ; scale *= 0.75) {
    const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
    const canvas = new OffscreenCanvas(width, height);
    const context = canvas.getContext("2d");
    Object.assign(context, { imageSmoothingQuality: "high", fillStyle: "white" }); // JPEG knows no transparency
    context.fillRect(0, 0, width, height);
    context.drawImage(bitmap, 0, 0, width, height);
    const blob = await canvas.convertToBlob({ type: "image/jpeg", quality: QUALITY });
    if (blob.size <= most) return blob;
  }
}

function dataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(blob);
  });
}
