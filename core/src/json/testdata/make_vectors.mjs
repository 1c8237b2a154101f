// Writes vectors.txt beside this file: what JSON.stringify prints, for json::tests.
//   node core/src/json/testdata/make_vectors.mjs
// Lines: `n <bits, hex> <text>` and `s <UTF-8, hex> <text>`. Deterministic.
import { writeFileSync } from 'node:fs';

let state = 0x9e3779b97f4a7c15n;
function random64() { // splitmix64
  state = (state + 0x9e3779b97f4a7c15n) & 0xffffffffffffffffn;
  let z = state;
  z = ((z ^ (z >> 30n)) * 0xbf58476d1ce4e5b9n) & 0xffffffffffffffffn;
  z = ((z ^ (z >> 27n)) * 0x94d049bb133111ebn) & 0xffffffffffffffffn;
  return z ^ (z >> 31n);
}
const view = new DataView(new ArrayBuffer(8));
const bitsOf = n => { view.setFloat64(0, n); return view.getBigUint64(0); };
const ofBits = b => { view.setBigUint64(0, b); return view.getFloat64(0); };
const lines = [];
const number = n => lines.push(`n ${bitsOf(n).toString(16).padStart(16, '0')} ${JSON.stringify(n)}`);
const string = s => lines.push(`s ${Buffer.from(s, 'utf8').toString('hex')} ${JSON.stringify(s)}`);

[0, -0, 1, -1, 0.1, 1 / 3, 1e21, 1e20, 123456789012345680000, 1e-6, 1e-7, 5e-324, Number.MAX_VALUE,
  Number.MIN_VALUE, Number.EPSILON, NaN, Infinity, -Infinity, 2 ** 53, 2 ** 53 - 1, -(2 ** 53), 2 ** 63,
  1764990000000.125, 1765000000123.456, 4.35, 0.000001234, 1.7976931348623157e308].forEach(number);
for (let i = 0; i < 300; i++) number(ofBits(random64()));
for (let i = 0; i < 100; i++) number(Number(BigInt.asIntN(64, random64())));
for (let i = 0; i < 100; i++) number(Number(random64() % 10n ** 16n) / 1000);
for (let e = -330; e <= 310; e += 7) { number(10 ** e); number(-1.5 * 10 ** e); }

for (let c = 0; c < 0x80; c++) string(`a${String.fromCharCode(c)}b`);
['', '\u2028\u2029', '\u00e9', '\ufeff', '😀', '\u0000', '"', '\\', 'x'.repeat(40), 'é'.repeat(9) + '"'].forEach(string);
const alphabet = ['a', 'é', '😀', '"', '\\', '\n', '\u0001', '\u007f', '\u2028', '\u0080', '!', '#', '[', ' '];
for (let i = 0; i < 150; i++) {
  let s = '';
  for (let n = random64() % 24n; n > 0n; n--) s += alphabet[Number(random64() % BigInt(alphabet.length))];
  string(s);
}
writeFileSync(new URL('vectors.txt', import.meta.url), lines.join('\n') + '\n');
