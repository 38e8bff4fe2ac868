/** `kvasir eval`: perplexity, KL and agreement of a recipe against the dense cache, on a text. */

import { readFile } from 'node:fs/promises'
import { CacheError } from '../errors.js'
import { Model } from '../model.js'
import { parseRecipe } from '../recipe.js'
import {
  type Command,
  digits,
  flags,
  modelFile,
  printJson,
  progress,
  table,
  UsageError,
  whole,
} from './shared.js'

export const evaluate: Command = {
  summary: 'perplexity, KL and agreement of a recipe against the dense cache',
  help: `  --model M     GGUF file or Hugging Face folder
  --text F      UTF-8 text file
  --recipe R    f16 (default), f32, int8, bf16+int8, streaming-llm:sinks=4,recent=252, or JSON
  --chunk S     ids per chunk (default 512); 0 = the whole file as one sequence
  --chunks N    chunks to measure, from the start (default 4)
  --prefix P    compute the first P ids of a chunk dense, then code or evict them, and measure the rest
  --bos ID      id in front of each chunk, context only; \`none\` for none. Default: what the tokenizer asks for
  --threads N   default: one per core
  --json        { tokens, perplexity, kl, top1, bytesPerToken, … }`,
  async run(args) {
    const f = flags(args, {
      json: { type: 'boolean' },
      model: { type: 'string' },
      text: { type: 'string' },
      recipe: { type: 'string' },
      chunk: { type: 'string' },
      chunks: { type: 'string' },
      prefix: { type: 'string' },
      bos: { type: 'string' },
      threads: { type: 'string' },
    })
    if (f.text === undefined) throw new UsageError('--text: name a UTF-8 text file')
    const { kv, recipe } = parseRecipe(f.recipe ?? 'f16')
    const chunk = whole('chunk', f.chunk, 512)
    const chunks = chunk === 0 ? 1 : whole('chunks', f.chunks, 4, 1)
    const prefix = whole('prefix', f.prefix, 0)
    const bos = f.bos === undefined ? undefined : f.bos === 'none' ? null : whole('bos', f.bos, 0)
    const text = await readFile(f.text, 'utf8').catch((error: Error) => {
      throw new CacheError('Io', `${f.text}: ${error.message}`, { path: f.text }, error)
    })
    const threads = f.threads === undefined ? {} : { threads: whole('threads', f.threads, 1, 1) }
    const model = await Model.load(modelFile(f.model), threads)
    try {
      const ids = await model.tokenizer.encode(text, { lead: false })
      const bar = progress('evaluating')
      const given = bos === undefined ? {} : { bos }
      const r = await model.evaluate(ids, {
        recipe,
        kv,
        chunk,
        chunks,
        prefix,
        ...given,
        onProgress: bar.onProgress,
      })
      bar.end(`${r.tokens} ids in ${(r.ms / 1000).toFixed(1)} s`)
      if (f.json) {
        printJson({ model: model.path, recipe: f.recipe ?? 'f16', chunk, chunks, prefix, ...r })
      } else {
        const header = [
          'recipe',
          'ids',
          'perplexity',
          'dense',
          'KL (nats)',
          'same top 1',
          'bytes/token',
        ]
        const row = [
          f.recipe ?? 'f16',
          String(r.tokens),
          r.perplexity.toFixed(4),
          r.densePerplexity.toFixed(4),
          r.kl.toFixed(5),
          `${(100 * r.top1).toFixed(1)} %`,
          digits(r.bytesPerToken),
        ]
        process.stdout.write(table(header, [row]))
      }
      return 0
    } finally {
      await model.close()
    }
  },
}
