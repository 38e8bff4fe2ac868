/**
 * Text to ids and back, from a GGUF header or a Hugging Face tokenizer.json.
 *
 * `@huggingface/tokenizers` does normalization, pre-tokenization and merging; this file builds its JSON for GGUF, finds special
 * tokens, adds the leading id, and decodes (bytes per id, so that streaming never splits a character).
 * Long texts are encoded in slices with the event loop free in between. A slice starts at a space between two letters: no
 * token of the supported kinds crosses such a place, so slicing gives the same ids as one go.
 */

import { Tokenizer as HfTokenizer } from '@huggingface/tokenizers'
import { CacheError, invalid } from './errors.js'

/** Options of `encode`. */
export interface EncodeOptions {
  /** Put the leading id in front where the model asks for one. Default true. */
  readonly lead?: boolean
  /** Read control tokens such as `<|im_start|>` in the text as what they mean. Default false: text from users must not forge them. */
  readonly special?: boolean
  /** Stops between two slices. */
  readonly signal?: AbortSignal
}

/** Options of `decode` and `decoder`. */
export interface DecodeOptions {
  /** Write control tokens out. Default false: they are left out. */
  readonly special?: boolean
  /** The ids continue a text, so a leading space is kept. Default false for `decode`, true for `decoder`. */
  readonly continues?: boolean
}

/** Decodes ids one by one; holds back the bytes of a character until it is whole. */
export interface StreamDecoder {
  /** Text that became whole with this id; may be empty. */
  push(id: number): string
  /** What is left; broken characters become U+FFFD. */
  flush(): string
}

/** A tokenizer of one model. Stateless: calls may overlap. */
export interface Tokenizer {
  /** Number of ids. */
  readonly vocabSize: number
  /** The id that goes in front of a text, or null where the model wants none. */
  readonly leadId: number | null
  /** Ids that end a reply. */
  readonly stopIds: readonly number[]
  /** Ids of a text. */
  encode(text: string, options?: EncodeOptions): Promise<Uint32Array>
  /** Text of ids. */
  decode(ids: ArrayLike<number>, options?: DecodeOptions): string
  /** A streaming decoder. */
  decoder(options?: DecodeOptions): StreamDecoder
  /** The id of a token, written exactly as in the vocabulary. */
  idOf(token: string): number | undefined
  /** The token of an id, as in the vocabulary. */
  tokenOf(id: number): string | undefined
}

type Json = Record<string, unknown>

/** What a tokenizer is made from. @internal */
export interface TokenizerSource {
  /** tokenizer.json without post-processor; added tokens are handled here. */
  readonly json: Json
  readonly added: readonly AddedToken[]
  readonly leadId: number | null
  readonly bosId: number | null
  readonly stopIds: readonly number[]
}

/** A token that is matched in the text before anything else. @internal */
export interface AddedToken {
  readonly id: number
  readonly content: string
  /** Matched only when special parsing is on, and left out when decoding. */
  readonly control: boolean
  readonly lstrip: boolean
  readonly rstrip: boolean
}

const SLICE = 4096

// --- GPT-2's printable stand-ins for bytes ------------------------------------------------------------------------------

const BYTE_OF = (() => {
  const map = new Map<string, number>()
  let next = 256
  for (let b = 0; b < 256; b++) {
    const printable = (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae
    map.set(String.fromCharCode(printable ? b : next++), b)
  }
  return map
})()

const UTF8 = new TextEncoder()

// --- the tokenizer ------------------------------------------------------------------------------------------------------

/** Builds a tokenizer; `Unsupported` for kinds that are not byte-level BPE or BPE with byte fallback. @internal */
export function createTokenizer(source: TokenizerSource): Tokenizer {
  const { json, added, leadId, bosId, stopIds } = source
  const kind = kindOf(json)
  const pre = everyNumber(json['pre_tokenizer'] ?? null)
  const hf = new HfTokenizer(
    { ...json, pre_tokenizer: pre, added_tokens: [], post_processor: null },
    {},
  )
  const inner = hf.model as unknown as {
    vocab: (string | undefined)[]
    tokens_to_ids: Map<string, number>
  }
  const vocab = [...inner.vocab]
  const ids = new Map(inner.tokens_to_ids)
  for (const token of added) {
    vocab[token.id] = token.content
    ids.set(token.content, token.id)
  }
  const addedById = new Map(added.map((t) => [t.id, t]))
  const always = matcher(added.filter((t) => !t.control))
  const all = matcher(added)
  const prepends = kind === 'spm' && hasPrepend(json['normalizer'])
  const sliced = canSlice(json, kind, vocab)
  const stripsLead =
    kind === 'spm' &&
    (prepends || JSON.stringify(json['pre_tokenizer'] ?? null).includes('Metaspace'))
  const bytes: (Uint8Array | undefined)[] = new Array(vocab.length)

  function bytesOf(id: number): Uint8Array {
    const known = bytes[id]
    if (known) return known
    const token = vocab[id]
    if (token === undefined) throw invalid('id', `an id below ${vocab.length} that has a token`, id)
    let out: Uint8Array
    if (addedById.has(id)) {
      out = UTF8.encode(token)
    } else if (kind === 'bytes') {
      const codes = Array.from(token, (c) => BYTE_OF.get(c))
      out = codes.every((c) => c !== undefined)
        ? Uint8Array.from(codes as number[])
        : UTF8.encode(token)
    } else {
      const hex = /^<0x([0-9A-Fa-f]{2})>$/.exec(token)
      out = hex
        ? Uint8Array.of(Number.parseInt(hex[1] as string, 16))
        : UTF8.encode(token.replaceAll('▁', ' '))
    }
    bytes[id] = out
    return out
  }

  function encodePiece(text: string, out: number[]): void {
    for (const id of hf.encode(text, { add_special_tokens: false }).ids) {
      if (id === undefined)
        throw new CacheError(
          'Malformed',
          'tokenizer: a character has no token and there is none for unknown ones',
        )
      out.push(id)
    }
  }

  async function encode(text: string, options: EncodeOptions = {}): Promise<Uint32Array> {
    if (typeof text !== 'string') throw invalid('text', 'a string', text)
    const out: number[] = []
    const { lead = true, special = false, signal } = options
    if (lead && leadId !== null) out.push(leadId)
    let fresh = 0 // characters since the event loop was last free
    for (const section of split(text, special ? all : always)) {
      if (section.added) {
        out.push(section.added.id)
        continue
      }
      let at = 0
      while (at < section.text.length) {
        const end = sliced ? cut(section.text, at + SLICE) : section.text.length
        // `Prepend` writes the space that a later slice begins with.
        encodePiece(section.text.slice(at > 0 && prepends ? at + 1 : at, end), out)
        fresh += end - at
        at = end
        if (fresh >= SLICE) {
          await new Promise<void>((resolve) => setImmediate(resolve))
          if (signal?.aborted)
            throw new CacheError('Cancelled', 'aborted by its signal', {}, signal.reason)
          fresh = 0
        }
      }
    }
    return Uint32Array.from(out)
  }

  function decoder(options: DecodeOptions = {}): StreamDecoder {
    const { special = false, continues = true } = options
    const utf8 = new TextDecoder('utf-8', { ignoreBOM: true })
    let first = !continues && stripsLead
    return {
      push(id) {
        if (!Number.isInteger(id) || id < 0) throw invalid('id', 'a whole number of 0 or more', id)
        let piece = bytesOf(id)
        if (addedById.get(id)?.control) {
          if (!continues && stripsLead && id === bosId) first = true
          if (!special) return ''
        } else if (first) {
          first = false
          if (piece[0] === 0x20) piece = piece.subarray(1)
        }
        return utf8.decode(piece, { stream: true })
      },
      flush: () => utf8.decode(),
    }
  }

  return {
    vocabSize: vocab.length,
    leadId,
    stopIds,
    encode,
    decoder,
    decode(list, options = {}) {
      const stream = decoder({ continues: false, ...options })
      let text = ''
      for (let i = 0; i < list.length; i++) text += stream.push(list[i] as number)
      return text + stream.flush()
    },
    idOf: (token) => ids.get(token),
    tokenOf: (id) => vocab[id],
  }
}

/** The next cut at or after `at`: before a space between two letters. */
function cut(text: string, at: number): number {
  const place = /(?<=\p{L}) (?=\p{L})/gu
  place.lastIndex = Math.max(at, 1)
  return place.exec(text)?.index ?? text.length
}

function matcher(
  tokens: readonly AddedToken[],
): { re: RegExp; by: Map<string, AddedToken> } | null {
  const by = new Map(tokens.filter((t) => t.content.length > 0).map((t) => [t.content, t]))
  if (by.size === 0) return null
  const longestFirst = [...by.keys()].sort((a, b) => b.length - a.length)
  return {
    re: new RegExp(
      longestFirst.map((s) => s.replace(/[.*+?^${}()|[\]\\/]/g, '\\$&')).join('|'),
      'g',
    ),
    by,
  }
}

function* split(
  text: string,
  m: ReturnType<typeof matcher>,
): Generator<{ text: string; added?: AddedToken }> {
  if (!m) {
    yield { text }
    return
  }
  let at = 0
  let trim = false
  for (const hit of text.matchAll(m.re)) {
    const added = m.by.get(hit[0]) as AddedToken
    let before = text.slice(at, hit.index)
    if (trim) before = before.trimStart()
    if (added.lstrip) before = before.trimEnd()
    if (before) yield { text: before }
    yield { text: hit[0], added }
    at = hit.index + hit[0].length
    trim = added.rstrip
  }
  const rest = trim ? text.slice(at).trimStart() : text.slice(at)
  if (rest) yield { text: rest }
}

function kindOf(json: Json): 'bytes' | 'spm' {
  const type = (json['model'] as Json | undefined)?.['type']
  const decoder = JSON.stringify(json['decoder'] ?? null)
  if (type === 'BPE' && decoder.includes('"ByteLevel"')) return 'bytes'
  if (type === 'BPE' && (decoder.includes('"ByteFallback"') || decoder.includes('"Metaspace"')))
    return 'spm'
  throw new CacheError(
    'Unsupported',
    `unsupported: tokenizer model ${String(type)} with decoder ${decoder.slice(0, 80)}`,
  )
}

function hasPrepend(normalizer: unknown): boolean {
  return JSON.stringify(normalizer ?? null).includes('"Prepend"')
}

function typesIn(config: unknown, out: string[] = []): string[] {
  const c = config as
    | { type?: string; normalizers?: unknown[]; pretokenizers?: unknown[] }
    | null
    | undefined
  if (c?.type) out.push(c.type)
  for (const inner of [...(c?.normalizers ?? []), ...(c?.pretokenizers ?? [])]) typesIn(inner, out)
  return out
}

/** `Digits` means every numeric character (½, Ⅷ) in the original; the JavaScript port splits at ASCII digits only. */
function everyNumber(pre: unknown): unknown {
  const p = pre as { type?: string; individual_digits?: boolean; pretokenizers?: unknown[] } | null
  if (p?.type === 'Digits') return split1(p.individual_digits ? '\\p{N}' : '\\p{N}+')
  if (p?.type === 'Sequence') return { ...p, pretokenizers: p.pretokenizers?.map(everyNumber) }
  return pre
}

/** Whether no token can cross a space between two letters. */
function canSlice(
  json: Json,
  kind: 'bytes' | 'spm',
  vocab: readonly (string | undefined)[],
): boolean {
  const known = [
    'Sequence',
    'Prepend',
    'Replace',
    'NFC',
    'Split',
    'Digits',
    'ByteLevel',
    'Metaspace',
  ]
  if (
    ![...typesIn(json['normalizer']), ...typesIn(json['pre_tokenizer'])].every((t) =>
      known.includes(t),
    )
  )
    return false
  // Byte-level patterns break before a space that follows a letter; elsewhere it is the vocabulary that decides.
  return kind === 'bytes' || !vocab.some((t) => t !== undefined && /[^▁]▁/u.test(t))
}

// --- GGUF ---------------------------------------------------------------------------------------------------------------

/** Pre-tokenizers of GGUF files by their `tokenizer.ggml.pre`. */
const byteLevel = (use_regex: boolean) => ({
  type: 'ByteLevel',
  add_prefix_space: false,
  trim_offsets: true,
  use_regex,
})
const split1 = (Regex: string) => ({
  type: 'Split',
  pattern: { Regex },
  behavior: 'Isolated',
  invert: false,
})
const PRE: Record<string, { pre: Json; ignoreMerges?: boolean; lead?: boolean }> = {
  smollm: {
    pre: {
      type: 'Sequence',
      pretokenizers: [{ type: 'Digits', individual_digits: true }, byteLevel(true)],
    },
  },
  'gpt-2': { pre: byteLevel(true) },
  'llama-bpe': {
    pre: {
      type: 'Sequence',
      pretokenizers: [
        split1(
          "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
        ),
        byteLevel(false),
      ],
    },
    ignoreMerges: true,
    lead: true,
  },
}

const NORMAL = 1
const CONTROL = 3
const USER_DEFINED = 4

/** Names of tokens that end a turn in one of the common templates, where they are control tokens. */
const END_NAMES = [
  '<|endoftext|>',
  '<|im_end|>',
  '<|eot_id|>',
  '<|end_of_text|>',
  '<|end|>',
  '</s>',
  '<|eom_id|>',
]

/** From the header of a GGUF file. @internal */
export function fromGguf(meta: Json): TokenizerSource {
  const key = (name: string) => meta[`tokenizer.ggml.${name}`]
  const model = key('model')
  const tokens = key('tokens')
  if (!Array.isArray(tokens) || !tokens.every((t) => typeof t === 'string')) {
    throw new CacheError('Malformed', 'tokenizer.ggml.tokens: expected a list of strings', {
      field: 'tokenizer.ggml.tokens',
    })
  }
  const types =
    (key('token_type') as number[] | undefined) ?? new Array<number>(tokens.length).fill(NORMAL)
  if (types.length !== tokens.length) {
    throw new CacheError(
      'Malformed',
      `tokenizer.ggml.token_type: expected ${tokens.length} numbers, got ${types.length}`,
    )
  }
  const number = (name: string) => (typeof key(name) === 'number' ? (key(name) as number) : null)
  const bosId = number('bos_token_id')
  const added: AddedToken[] = []
  const named: number[] = []
  tokens.forEach((content, id) => {
    const type = types[id]
    if (type !== CONTROL && type !== USER_DEFINED) return
    added.push({ id, content, control: type === CONTROL, lstrip: false, rstrip: false })
    if (type === CONTROL && END_NAMES.includes(content)) named.push(id)
  })
  const ends = [number('eos_token_id'), number('eot_token_id'), number('eom_token_id'), ...named]
  const stopIds = [...new Set(ends.filter((id): id is number => id !== null))]
  const vocab = Object.fromEntries(tokens.map((t, id) => [t, id]))
  const wantsLead = (fallback: boolean) =>
    (typeof key('add_bos_token') === 'boolean' ? key('add_bos_token') : fallback) as boolean
  const source = (json: Json, lead: boolean) => ({
    json,
    added,
    bosId,
    leadId: lead ? bosId : null,
    stopIds,
  })

  if (model === 'gpt2') {
    const name = String(key('pre') ?? 'gpt-2')
    const pre = PRE[name === 'llama3' || name === 'llama-v3' ? 'llama-bpe' : name]
    if (!pre)
      throw new CacheError(
        'Unsupported',
        `unsupported: tokenizer.ggml.pre ${JSON.stringify(name)}; known: ${Object.keys(PRE).join(', ')}`,
      )
    const merges = key('merges')
    if (!Array.isArray(merges))
      throw new CacheError('Malformed', 'tokenizer.ggml.merges: expected a list')
    return source(
      {
        normalizer: null,
        pre_tokenizer: pre.pre,
        decoder: byteLevel(true),
        model: {
          type: 'BPE',
          vocab,
          merges: merges.map(splitMerge),
          unk_token: null,
          ignore_merges: pre.ignoreMerges ?? false,
        },
      },
      wantsLead(pre.lead ?? false),
    )
  }
  if (model === 'llama') {
    const scores = key('scores') as number[] | undefined
    if (!Array.isArray(scores) || scores.length !== tokens.length) {
      throw new CacheError('Malformed', `tokenizer.ggml.scores: expected ${tokens.length} numbers`)
    }
    const prefix = key('add_space_prefix') !== false
    const space = { type: 'Replace', pattern: { String: ' ' }, content: '▁' }
    const unknown = tokens[number('unknown_token_id') ?? 0]
    return source(
      {
        normalizer: prefix
          ? { type: 'Sequence', normalizers: [{ type: 'Prepend', prepend: '▁' }, space] }
          : space,
        pre_tokenizer: null,
        decoder: { type: 'Sequence', decoders: [{ type: 'ByteFallback' }] },
        model: {
          type: 'BPE',
          vocab,
          merges: mergesFromScores(tokens, scores, types),
          unk_token: unknown,
          byte_fallback: true,
          fuse_unk: true,
        },
      },
      wantsLead(true),
    )
  }
  throw new CacheError(
    'Unsupported',
    `unsupported: tokenizer.ggml.model ${JSON.stringify(model)}; known: gpt2, llama`,
  )
}

/** `a b` at the space that separates: pieces are byte-level, so they hold none. */
function splitMerge(merge: unknown): [string, string] {
  const at = typeof merge === 'string' ? merge.indexOf(' ', 1) : -1
  if (at < 0)
    throw new CacheError(
      'Malformed',
      `tokenizer.ggml.merges: expected "a b", got ${JSON.stringify(merge)}`,
    )
  return [(merge as string).slice(0, at), (merge as string).slice(at + 1)]
}

/** SentencePiece merges by the score of the result: every split of a piece into two pieces, best piece first. */
function mergesFromScores(tokens: string[], scores: number[], types: number[]): [string, string][] {
  const ids = tokens.map((_, id) => id).filter((id) => types[id] === NORMAL)
  const known = new Set(ids.map((id) => tokens[id] as string))
  ids.sort((a, b) => (scores[b] as number) - (scores[a] as number) || a - b)
  const merges: [string, string][] = []
  for (const id of ids) {
    const piece = Array.from(tokens[id] as string)
    for (let i = 1; i < piece.length; i++) {
      const pair: [string, string] = [piece.slice(0, i).join(''), piece.slice(i).join('')]
      if (known.has(pair[0]) && known.has(pair[1])) merges.push(pair)
    }
  }
  return merges
}

// --- Hugging Face -------------------------------------------------------------------------------------------------------

/** From tokenizer.json, tokenizer_config.json and generation_config.json. @internal */
export function fromHf(json: Json, config: Json, generation: Json): TokenizerSource {
  const list = (json['added_tokens'] as Json[] | undefined) ?? []
  const added = list.map((t) => ({
    id: t['id'] as number,
    content: t['content'] as string,
    control: t['special'] === true,
    lstrip: t['lstrip'] === true,
    rstrip: t['rstrip'] === true,
  }))
  const vocab = ((json['model'] as Json | undefined)?.['vocab'] ?? {}) as Record<string, number>
  const byName = (token: unknown): number | null => {
    const name = typeof token === 'string' ? token : (token as { content?: string } | null)?.content
    return name === undefined
      ? null
      : (added.find((t) => t.content === name)?.id ?? vocab[name] ?? null)
  }
  const bosId = byName(config['bos_token'])
  const template = templateLead(json['post_processor'])
  const add = config['add_bos_token']
  const leadId = add === true ? bosId : add === false ? null : byName(template)
  const fromGeneration = ([] as unknown[])
    .concat(generation['eos_token_id'] ?? [])
    .filter((x): x is number => typeof x === 'number')
  const named = added.filter((t) => t.control && END_NAMES.includes(t.content)).map((t) => t.id)
  const eos = byName(config['eos_token'])
  const stopIds = [...new Set([...(eos === null ? [] : [eos]), ...fromGeneration, ...named])]
  return { json, added, bosId, leadId, stopIds }
}

/** The special token a TemplateProcessing puts in front. */
function templateLead(post: unknown): string | null {
  const p = post as {
    type?: string
    single?: { SpecialToken?: { id: string } }[]
    processors?: unknown[]
  } | null
  if (p?.type === 'Sequence') return p.processors?.map(templateLead).find((t) => t !== null) ?? null
  return (p?.type === 'TemplateProcessing' && p.single?.[0]?.SpecialToken?.id) || null
}
