/** numpy's PCG64 and its seeding, so that a seed means the same text as in Python. */

const M128 = (1n << 128n) - 1n;
const M64 = (1n << 64n) - 1n;
const MULTIPLIER = 0x2360ed051fc65da44385df649fccf645n;

/** The state that `numpy.random.SeedSequence(seed)` gives, as 64-bit words. */
function seedState(seed: bigint): bigint[] {
  const entropy = [Number(seed & 0xffffffffn), ...(seed >> 32n ? [Number(seed >> 32n)] : [])];
  let constant = 0x43b0d7e5;
  const hashed = (value: number): number => {
    value = (value ^ constant) >>> 0;
    constant = Math.imul(constant, 0x931e8875) >>> 0;
    value = Math.imul(value, constant) >>> 0;
    return (value ^ (value >>> 16)) >>> 0;
  };
  const mixed = (x: number, y: number): number => {
    const found = (Math.imul(0xca01f9dd, x) - Math.imul(0x4973f715, y)) >>> 0;
    return (found ^ (found >>> 16)) >>> 0;
  };
  const pool = [0, 1, 2, 3].map((i) => hashed(entropy[i] ?? 0));
  for (let source = 0; source < 4; source++) {
    for (let target = 0; target < 4; target++) {
      if (source !== target) pool[target] = mixed(pool[target]!, hashed(pool[source]!));
    }
  }
  let other = 0x8b51f9dd;
  const words = Array.from({ length: 8 }, (_, i) => {
    let value = (pool[i % 4]! ^ other) >>> 0;
    other = Math.imul(other, 0x58f38ded) >>> 0;
    value = Math.imul(value, other) >>> 0;
    return BigInt((value ^ (value >>> 16)) >>> 0);
  });
  return [0, 2, 4, 6].map((i) => words[i]! | (words[i + 1]! << 32n));
}

/** `numpy.random.Generator(numpy.random.PCG64(seed))`; without a seed, from the system's randomness. */
export class Pcg64 {
  private state: bigint;
  private readonly increment: bigint;

  constructor(seed: bigint | null) {
    if (seed === null) {
      const words = globalThis.crypto.getRandomValues(new BigUint64Array(1));
      seed = words[0]!;
    }
    const [high, low, streamHigh, streamLow] = seedState(seed) as [bigint, bigint, bigint, bigint];
    this.increment = ((((streamHigh << 64n) | streamLow) << 1n) | 1n) & M128;
    this.state = (this.increment + ((high << 64n) | low)) & M128;
    this.step();
  }

  /** The next number of [0, 1). */
  random(): number {
    this.step();
    const word = ((this.state >> 64n) ^ this.state) & M64;
    const turn = this.state >> 122n;
    const turned = ((word >> turn) | (word << (64n - turn))) & M64;
    return Number(turned >> 11n) / 2 ** 53;
  }

  private step(): void {
    this.state = (this.state * MULTIPLIER + this.increment) & M128;
  }
}
