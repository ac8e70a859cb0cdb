"use strict";
// What the page holds: facts as JSON, and arrays as deflated bytes in base64.

const ARRAY_TYPES = {
  int8: Int8Array, uint8: Uint8Array, int16: Int16Array, uint16: Uint16Array, int32: Int32Array, float32: Float32Array,
};

/** One array: {values, shape}; its text is dropped. */
async function readArray(element) {
  const text = atob(element.textContent);
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const values = new ARRAY_TYPES[element.dataset.dtype](await new Response(unpacked).arrayBuffer());
  const shape = element.dataset.shape.split(",").map(Number);
  element.remove();
  return {values, shape};
}

/** All arrays by name. */
async function readArrays() {
  const arrays = {};
  for (const element of document.querySelectorAll("script[data-array]")) {
    arrays[element.dataset.array] = await readArray(element);
  }
  return arrays;
}
