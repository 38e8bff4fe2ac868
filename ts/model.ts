/** A model in memory: its shape, its tokenizer, its weights. */

import { readFile, stat } from 'node:fs/promises'
import path from 'node:path'
import { type ChatTemplate, createTemplate } from './chat.js'
import { CacheError, fromNative, invalid } from './errors.js'
import {
  guard,
  type NativeEvalOptions,
  type NativeEvalResult,
  type NativeLayout,
  type NativeModel,
  type NativeModelInfo,
  native,
  type Watch,
  watched,
} from './native.js'
import type { KvDtype, Recipe } from './recipe.js'
import { type SamplingOptions, samplingJson } from './sampling.js'
import { nativeOf, type Session, toIds } from './session.js'
import {
  createTokenizer,
  fromGguf,
  fromHf,
  type Tokenizer,
  type TokenizerSource,
} from './tokenizer.js'

type Json = Record<string, unknown>

/** Shape of a model's cache, and who it is. */
export type Layout = NativeLayout

/** What a model is. */
export type ModelInfo = NativeModelInfo

/** Options of `Model.load`. */
export interface LoadOptions {
  /** Threads that compute; models loaded with the same number share them. Default: one per core. */
  readonly threads?: number
  /** Kernels: `auto` (default) takes the fastest that this CPU has; `scalar` is the reference. */
  readonly isa?: 'auto' | 'scalar' | 'avx2'
  readonly signal?: AbortSignal
  /** Called about ten times a second with tensors read and tensors in all. */
  readonly onProgress?: (done: number, total: number) => void
}

/** Options of `Model.evaluate`. */
export interface EvaluateOptions {
  /** Policies of the measured run. Default: none. */
  readonly recipe?: Recipe
  /** How the measured run keeps dense rows. Default `f16`; the reference is always f32. */
  readonly kv?: KvDtype
  /** Ids per chunk; 0 (default) takes all ids as one sequence. */
  readonly chunk?: number
  /** Chunks to measure, from the start. Default 1. */
  readonly chunks?: number
  /** First ids of each chunk that are computed dense and then coded or evicted; only the rest is measured. Default 0. */
  readonly prefix?: number
  /** Id in front of each chunk. Default: what the model's tokenizer asks for; null for none. */
  readonly bos?: number | null
  readonly signal?: AbortSignal
  readonly onProgress?: (done: number, total: number) => void
}

/** How far a recipe is from the dense cache. */
export type Evaluation = NativeEvalResult

/** A loaded model. Sessions share its weights. */
export class Model implements AsyncDisposable {
  /** Where it was loaded from. */
  readonly path: string
  readonly info: ModelInfo
  /** Text to ids and back. */
  readonly tokenizer: Tokenizer
  /** The model's own chat template, or null where it has none. */
  readonly chat: ChatTemplate | null
  /** @internal */
  readonly native: NativeModel

  private constructor(file: string, model: NativeModel, info: ModelInfo, text: TextParts) {
    this.path = file
    this.native = model
    this.info = info
    this.tokenizer = text.tokenizer
    this.chat = text.chat
  }

  /**
   * Loads a GGUF file or a Hugging Face folder of the Llama family.
   *
   * @throws CacheError `Io` (no such file), `Malformed` (damaged), `Unsupported` (another architecture or tensor type, named).
   */
  static async load(file: string, options: LoadOptions = {}): Promise<Model> {
    if (typeof file !== 'string' || file === '')
      throw invalid('path', 'the path of a GGUF file or a model folder', file)
    const { threads, isa = 'auto', signal, onProgress } = options
    if (threads !== undefined && (!Number.isInteger(threads) || threads < 1))
      throw invalid('threads', 'a whole number of 1 or more', threads)
    const opts = JSON.stringify({ threads, isa: isa === 'auto' ? undefined : isa })
    const model = await watched({ signal, onProgress }, (cancel) =>
      native().loadModel(file, opts, cancel),
    )
    try {
      const info = JSON.parse(model.info()) as ModelInfo
      return new Model(
        file,
        model,
        info,
        await textParts(file, JSON.parse(model.metadata()) as Json),
      )
    } catch (error) {
      model.close()
      throw fromNative(error)
    }
  }

  /** Shape of the model's cache. */
  get layout(): Layout {
    return this.info.layout
  }

  /** Tokens the model was trained to see at once. Longer sessions are refused with `ContextOverflow`; nothing is dropped silently. */
  get context(): number {
    return this.info.context
  }

  /** Digest of hyperparameters and weights, hex. Two models share stored rows only if it is equal. */
  get fingerprint(): string {
    return this.info.fingerprint
  }

  /**
   * One more id for several sequences in one batch: chooses an id for each session from its logits, runs the model once over
   * all, and returns the ids. All sessions move or none.
   */
  async step(
    sessions: readonly Session[],
    options: SamplingOptions & { readonly signal?: AbortSignal } = {},
  ): Promise<Uint32Array> {
    const inner = sessions.map(nativeOf)
    const sampling = samplingJson(options)
    const ids = guard(() => Uint32Array.from(inner, (s) => s.sample(sampling)))
    await watched({ signal: options.signal }, (cancel) => native().stepMany(inner, ids, cancel))
    return ids
  }

  /** Measures a recipe against the dense f32 cache on a text: perplexity, KL, agreement, bytes. */
  async evaluate(
    ids: Uint32Array | readonly number[],
    options: EvaluateOptions = {},
  ): Promise<Evaluation> {
    const {
      recipe = [],
      kv = 'f16',
      chunk = 0,
      chunks = 1,
      prefix = 0,
      bos = this.tokenizer.leadId,
    } = options
    const opts: NativeEvalOptions = {
      recipe,
      kv,
      chunk,
      chunks,
      prefix,
      lead: bos,
      reference: true,
    }
    const list = toIds('ids', ids)
    const watch: Watch = { signal: options.signal, onProgress: options.onProgress }
    return JSON.parse(
      await watched(watch, (cancel) => this.native.evaluate(list, JSON.stringify(opts), cancel)),
    ) as Evaluation
  }

  /** Lets go of the weights once no session uses them. */
  async close(): Promise<void> {
    guard(() => this.native.close())
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }
}

interface TextParts {
  readonly tokenizer: Tokenizer
  readonly chat: ChatTemplate | null
}

/** Tokenizer and template out of a GGUF header or the JSON files of a folder. */
async function textParts(file: string, metadata: Json): Promise<TextParts> {
  let source: TokenizerSource
  let template: unknown
  let names: { bos: unknown; eos: unknown }
  if (metadata['format'] === 'gguf') {
    const meta = metadata['metadata'] as Json
    source = fromGguf(meta)
    template = meta['tokenizer.chat_template']
    const tokens = meta['tokenizer.ggml.tokens'] as string[]
    const at = (key: string) => tokens[meta[`tokenizer.ggml.${key}_token_id`] as number]
    names = { bos: at('bos'), eos: at('eos') }
  } else {
    const folder = (await stat(file)).isDirectory() ? file : path.dirname(file)
    const config = await readJson(path.join(folder, 'tokenizer_config.json'), {})
    source = fromHf(
      await readJson(path.join(folder, 'tokenizer.json')),
      config,
      await readJson(path.join(folder, 'generation_config.json'), {}),
    )
    template = await readFile(path.join(folder, 'chat_template.jinja'), 'utf8').catch(
      () => config['chat_template'],
    )
    const name = (t: unknown) =>
      typeof t === 'string' ? t : (t as Json | null | undefined)?.['content']
    names = { bos: name(config['bos_token']), eos: name(config['eos_token']) }
  }
  const special = { bos_token: String(names.bos ?? ''), eos_token: String(names.eos ?? '') }
  return {
    tokenizer: createTokenizer(source),
    chat: typeof template === 'string' ? createTemplate(template, special) : null,
  }
}

async function readJson(file: string, otherwise?: Json): Promise<Json> {
  let text: string
  try {
    text = await readFile(file, 'utf8')
  } catch (error) {
    if (otherwise) return otherwise
    throw new CacheError('Io', `${file}: ${(error as Error).message}`, { path: file }, error)
  }
  try {
    return JSON.parse(text) as Json
  } catch (error) {
    throw new CacheError('Malformed', `${file}: ${(error as Error).message}`, { path: file }, error)
  }
}
