/** Bytes: SHA-256, half-precision floats, base64. */

import { UnsupportedError } from "./errors.ts";

/** SHA-256 in hexadecimal. */
export async function sha256(data: Uint8Array): Promise<string> {
  const subtle = globalThis.crypto?.subtle;
  if (!subtle) throw new UnsupportedError("SHA-256 needs a secure context: serve the page over https, or from localhost");
  const digest = new Uint8Array(await subtle.digest("SHA-256", data as Uint8Array<ArrayBuffer>));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

const SCRATCH = new DataView(new ArrayBuffer(4));

/** float32 of half-precision bits. */
export function fromHalf(bits: Uint16Array): Float32Array {
  const found = new Float32Array(bits.length);
  for (let i = 0; i < bits.length; i++) {
    const half = bits[i]!;
    const sign = half & 0x8000 ? -1 : 1;
    const exponent = (half >> 10) & 0x1f;
    const fraction = half & 0x3ff;
    if (exponent === 0) found[i] = sign * fraction * 2 ** -24;
    else if (exponent === 31) found[i] = fraction ? NaN : sign * Infinity;
    else found[i] = sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  }
  return found;
}

/** Half-precision bits of float32, rounded to nearest even. */
export function toHalf(values: Float32Array): Uint16Array {
  const found = new Uint16Array(values.length);
  for (let i = 0; i < values.length; i++) {
    SCRATCH.setFloat32(0, values[i]!);
    const bits = SCRATCH.getUint32(0);
    const sign = (bits >>> 16) & 0x8000;
    const exponent = ((bits >>> 23) & 0xff) - 127 + 15;
    const fraction = bits & 0x7fffff;
    if (exponent >= 31) {
      found[i] = sign | 0x7c00 | ((bits & 0x7fffffff) > 0x7f800000 ? 0x200 : 0);
      continue;
    }
    const shift = exponent <= 0 ? 14 - exponent : 13;
    if (shift > 24) {
      found[i] = sign;
      continue;
    }
    const whole = exponent <= 0 ? fraction | 0x800000 : fraction;
    const rest = whole & ((1 << shift) - 1);
    const middle = 1 << (shift - 1);
    let half = (exponent <= 0 ? 0 : exponent << 10) + (whole >>> shift);
    if (rest > middle || (rest === middle && half & 1)) half++;
    found[i] = sign | half;
  }
  return found;
}

/** Bytes of base64. */
export function fromBase64(text: string): Uint8Array {
  return Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
}
