import { describe, expect, inject, it } from 'vitest'
import { createTokenizer, fromGguf, fromHf } from '../ts/tokenizer.js'
import { json, TINY, text, u16 } from './data.js'
import { readGgufMetadata } from './gguf.js'

interface Golden {
  tokenization: { text: string; ids: number[]; ids_special_as_text: number[] | null }[]
}

const alice = text('assets/alice.txt')
const hfJson = json<Record<string, unknown>>('testdata/models/stories260K-hf/tokenizer.json')
const hfConfig = json<Record<string, unknown>>(
  'testdata/models/stories260K-hf/tokenizer_config.json',
)
const tiny = {
  gguf: createTokenizer(fromGguf(readGgufMetadata(TINY))),
  hf: createTokenizer(fromHf(hfJson, hfConfig, { eos_token_id: 2 })),
}

describe.each(['gguf', 'hf'] as const)('stories260K from %s', (source) => {
  const t = tiny[source]

  it('puts the leading id in front and a space before the first word', async () => {
    expect([...(await t.encode('Zoo'))]).toEqual([1, 410, 469, 347])
    const park = [1, 317, 269, 392, 412, 444, 263, 377, 267, 265, 282, 295, 433]
    expect([...(await t.encode('Lily and Max went to the park'))]).toEqual(park)
    expect([...(await t.encode(''))]).toEqual([1])
    expect([...(await t.encode('Zoo', { lead: false }))]).toEqual([410, 469, 347])
    expect(t.stopIds).toEqual([2])
  })

  it('encodes a whole book as it was measured, and decodes it back byte for byte', async () => {
    const ids = await t.encode(alice, { lead: false })
    expect(ids).toEqual(u16('testdata/golden/alice.tok512.u16'))
    expect(t.decode(ids)).toBe(alice)
  })

  it('falls back to bytes and streams them without splitting characters', async () => {
    const s = 'Zoë 東京 🦊!'
    const ids = await t.encode(s, { lead: false })
    expect(t.decode(ids)).toBe(s)
    const stream = t.decoder()
    const parts = [...ids].map((id) => stream.push(id))
    expect(parts.join('') + stream.flush()).toBe(` ${s}`)
    expect(parts.join('')).not.toContain('\ufffd')
    expect(parts.filter((p) => p.includes('🦊'))).toHaveLength(1)
  })

  it('takes control tokens from a text only when told to', async () => {
    expect([...(await t.encode('a</s>', { lead: false }))]).not.toContain(2)
    expect([...(await t.encode('a</s>', { lead: false, special: true }))].at(-1)).toBe(2)
    expect(t.decode([1, 410, 469, 347, 2])).toBe('Zoo')
    expect(t.decode([1, 410, 469, 347, 2], { special: true })).toBe('<s>Zoo</s>')
  })

  it('refuses ids that have no token', () => {
    expect(() => t.decode([512])).toThrowError(expect.objectContaining({ code: 'InvalidArgument' }))
    expect(() => t.decoder().push(-1)).toThrowError(
      expect.objectContaining({ code: 'InvalidArgument' }),
    )
    expect(() => t.decoder().push(1.5)).toThrowError(
      expect.objectContaining({ code: 'InvalidArgument' }),
    )
  })
})

it('slices give the ids of one go, also around tokens and runs of spaces', async () => {
  // The reference encodes piecewise at places of its own choosing: one line at a time through a fresh tokenizer.
  const t = tiny.hf
  const long = `${'word  two   three 4 '.repeat(900)}${alice.slice(0, 9000)}`
  const whole = createTokenizer({
    ...fromHf(hfJson, hfConfig, {}),
    json: { ...hfJson, normalizer: oneGo(hfJson['normalizer']) },
  })
  expect(await t.encode(long)).toEqual(await whole.encode(long))
})

/** The same normalizer with an idle member of a kind that slicing does not know. */
function oneGo(normalizer: unknown): unknown {
  return {
    type: 'Sequence',
    normalizers: [normalizer, { type: 'Lowercase' }]
      .slice(0, 1)
      .concat([{ type: 'Strip', strip_left: false, strip_right: false }]),
  }
}

it('leaves the event loop free while it encodes a long text', async () => {
  let longest = 0
  let last = performance.now()
  const timer = setInterval(() => {
    longest = Math.max(longest, performance.now() - last)
    last = performance.now()
  }, 1)
  await tiny.gguf.encode(alice.repeat(4))
  clearInterval(timer)
  expect(longest).toBeLessThan(100)
})

it('stops between slices when its signal is aborted', async () => {
  const stop = new AbortController()
  const run = tiny.gguf.encode(alice, { signal: stop.signal })
  stop.abort()
  await expect(run).rejects.toMatchObject({ code: 'Cancelled' })
})

it('refuses tokenizers it does not know by name', () => {
  expect(() =>
    fromGguf({ 'tokenizer.ggml.model': 'bert', 'tokenizer.ggml.tokens': [] }),
  ).toThrowError(/"bert"/)
  const odd = {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'tekken',
    'tokenizer.ggml.tokens': ['a'],
  }
  expect(() => fromGguf(odd)).toThrowError(/"tekken"/)
  const short = {
    'tokenizer.ggml.model': 'llama',
    'tokenizer.ggml.tokens': ['a'],
    'tokenizer.ggml.scores': [],
  }
  expect(() => fromGguf(short)).toThrowError(expect.objectContaining({ code: 'Malformed' }))
})

const smollm = inject('smollm')
describe.runIf(smollm)('SmolLM2', () => {
  const t = createTokenizer(fromGguf(readGgufMetadata(smollm as string)))

  it('gives the golden ids, with control tokens read as such and as text', async () => {
    const { tokenization } = json<Golden>('testdata/smollm2/golden.json')
    for (const g of tokenization) {
      expect([...(await t.encode(g.text, { special: true }))]).toEqual(g.ids)
      expect([...(await t.encode(g.text))]).toEqual(g.ids_special_as_text ?? g.ids)
      expect(t.decode(g.ids, { special: true })).toBe(g.text)
    }
    expect(t.leadId).toBeNull()
    expect(t.stopIds).toEqual([2, 0])
  })

  it('encodes a whole book as it was measured', async () => {
    expect(await t.encode(alice)).toEqual(u16('testdata/smollm2/alice.smollm2.u16'))
  })
})
