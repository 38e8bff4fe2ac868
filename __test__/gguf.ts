/** A reader of GGUF headers, for tests of the tokenizer that need no native file. */

import { closeSync, openSync, readSync } from 'node:fs'

export function readGgufMetadata(path: string): Record<string, unknown> {
  const b = Buffer.alloc(8 << 20)
  const fd = openSync(path, 'r')
  readSync(fd, b, 0, b.length, 0)
  closeSync(fd)
  if (b.toString('latin1', 0, 4) !== 'GGUF') throw new Error('not a GGUF file')

  let at = 16 // magic, version, number of tensors
  const take = (bytes: number) => {
    at += bytes
    return at - bytes
  }
  const u64 = () => Number(b.readBigUInt64LE(take(8)))
  const str = () => {
    const n = u64()
    const from = take(n)
    return b.toString('utf8', from, from + n)
  }
  const scalar: Record<number, () => unknown> = {
    0: () => b.readUInt8(take(1)),
    1: () => b.readInt8(take(1)),
    2: () => b.readUInt16LE(take(2)),
    3: () => b.readInt16LE(take(2)),
    4: () => b.readUInt32LE(take(4)),
    5: () => b.readInt32LE(take(4)),
    6: () => b.readFloatLE(take(4)),
    7: () => b.readUInt8(take(1)) !== 0,
    8: str,
    10: u64,
    11: () => Number(b.readBigInt64LE(take(8))),
    12: () => b.readDoubleLE(take(8)),
  }
  const value = (type: number): unknown => {
    if (type === 9) {
      const inner = b.readUInt32LE(take(4))
      return Array.from({ length: u64() }, () => value(inner))
    }
    const read = scalar[type]
    if (!read) throw new Error(`type ${type}`)
    return read()
  }
  const count = u64()
  return Object.fromEntries(
    Array.from({ length: count }, () => [str(), value(b.readUInt32LE(take(4)))]),
  )
}
