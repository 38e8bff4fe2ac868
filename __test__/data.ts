/** Inputs and expected values in the repository. */

import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'

export const root = fileURLToPath(new URL('..', import.meta.url))
export const path = (name: string): string => `${root}${name}`
export const text = (name: string): string => readFileSync(path(name), 'utf8')
export const json = <T>(name: string): T => JSON.parse(text(name)) as T

/** Ids stored as little-endian uint16. */
export function u16(name: string): Uint32Array {
  const b = readFileSync(path(name))
  return Uint32Array.from({ length: b.length / 2 }, (_, i) => b.readUInt16LE(2 * i))
}

export const TINY = path('testdata/models/stories260K-f32.gguf')
export const TINY_F16 = path('testdata/models/stories260K-f16.gguf')
export const TINY_HF = path('testdata/models/stories260K-hf')
