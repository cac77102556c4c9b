// A zip archive of small files, stored as they are.

"use strict";
const CRC_TABLE = Uint32Array.from({length: 256}, (_, byte) => {
  for (let bit = 0; bit < 8; bit++) byte = byte & 1 ? (byte >>> 1) ^ 0xedb88320 : byte >>> 1;
  return byte;
});
const MOST_FILES = 0xffff;
const UTF8_NAMES = 0x0800;

function crc32(bytes) {
  let crc = ~0;
  for (const byte of bytes) crc = CRC_TABLE[(crc ^ byte) & 255] ^ (crc >>> 8);
  return ~crc >>> 0;
}

// Numbers as little-endian bytes: each argument is [value, bytes].
function packed(...numbers) {
  return Uint8Array.from(numbers.flatMap(([value, size]) => Array.from({length: size}, (_, at) => value >>> (8 * at))));
}

// The archive of [name, text] pairs, as parts of a Blob; texts are written in UTF-8.
function zip(files, now = new Date()) {
  if (files.length > MOST_FILES) throw new RangeError(`a zip of more than ${MOST_FILES} files`);
  const encoder = new TextEncoder(), parts = [], entries = [];
  const time = now.getHours() << 11 | now.getMinutes() << 5 | now.getSeconds() >> 1;
  const day = now.getFullYear() - 1980 << 9 | now.getMonth() + 1 << 5 | now.getDate();
  let start = 0;
  for (const [name, text] of files) {
    const path = encoder.encode(name), data = encoder.encode(text), size = data.length;
    const about = packed([20, 2], [UTF8_NAMES, 2], [0, 2], [time, 2], [day, 2], [crc32(data), 4], [size, 4], [size, 4],
                         [path.length, 2], [0, 2]);
    entries.push(packed([0x02014b50, 4], [20, 2]), about, packed([0, 2], [0, 2], [0, 2], [0, 4], [start, 4]), path);
    parts.push(packed([0x04034b50, 4]), about, path, data);
    start += 30 + path.length + size;
  }
  const length = entries.reduce((sum, part) => sum + part.length, 0);
  return [...parts, ...entries, packed([0x06054b50, 4], [0, 2], [0, 2], [files.length, 2], [files.length, 2],
                                       [length, 4], [start, 4], [0, 2])];
}
