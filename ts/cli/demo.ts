/**
 * `kvasir demo`: prefill once, for real. One process prefills a long text, commits it and ends; a second one resumes it and
 * goes on. Fails if the resume read nothing back or if the lossless recipe does not continue exactly.
 */

import { spawn } from 'node:child_process'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { CacheError } from '../errors.js'
import { Model } from '../model.js'
import { parseRecipe } from '../recipe.js'
import type { Session } from '../session.js'
import { openStore } from '../store.js'
import {
  type Command,
  digits,
  flags,
  modelFile,
  note,
  printJson,
  progress,
  table,
  UsageError,
  whole,
} from './shared.js'

/** What the first process reports. */
interface Written {
  readonly prefillMs: number
  readonly bytesHeld: number
  readonly tokens: number
  readonly digest: string
  readonly next: readonly number[]
}

/** What the second process reports. */
interface Resumed {
  readonly resumeMs: number
  readonly reused: number
  readonly computed: number
  readonly why: string
  readonly digest: string
  readonly next: readonly number[]
  readonly text: string
}

/** One recipe of the result. */
export interface DemoRecipe {
  readonly recipe: string
  readonly bytesPer1kTokens: number
  readonly prefillMs: number
  readonly resumeMs: number
  readonly reused: number
  readonly computed: number
  /** Digests of all tables are equal and so are the next 64 greedy ids. */
  readonly identical: boolean
  readonly kl: number
  readonly perplexityRatio: number
}

const RECIPES = ['f16', 'int8']
const NEXT = 64
const TENANT = 'demo'
/** The bundled text, beside dist in the package and in the repository. */
const TEXT = fileURLToPath(new URL('../assets/alice.txt', import.meta.url))

export const demo: Command = {
  summary: 'prefill a long text, end the process, resume it in a new one, go on',
  help: `  --model M     GGUF file or Hugging Face folder of the Llama family
  --text F      UTF-8 text (default: the opening of Alice's Adventures in Wonderland)
  --tokens N    ids to prefill (default 2048, less for models with a shorter context)
  --threads N   default: one per core
  --json        { model, tokens, prefillMs, recipes: [{ recipe, bytesPer1kTokens, prefillMs, resumeMs, reused, computed,
                identical, kl, perplexityRatio }] }
Exit status 1 if a resume reused nothing or if f16 did not continue exactly.`,
  async run(args) {
    const f = flags(args, {
      json: { type: 'boolean' },
      model: { type: 'string' },
      text: { type: 'string' },
      tokens: { type: 'string' },
      threads: { type: 'string' },
      // Between this process and its two children:
      phase: { type: 'string' },
      dir: { type: 'string' },
      recipe: { type: 'string' },
    })
    const threads = f.threads === undefined ? {} : { threads: whole('threads', f.threads, 1, 1) }
    const file = modelFile(f.model)
    if (f.phase !== undefined)
      return phase(
        f.phase,
        file,
        f.dir ?? '',
        f.recipe ?? '',
        f.text ?? TEXT,
        whole('tokens', f.tokens, 0),
        threads,
      )

    const loading = progress(`loading ${path.basename(file)}`)
    const model = await Model.load(file, { ...threads, onProgress: loading.onProgress })
    const dir = await mkdtemp(path.join(tmpdir(), 'kvasir-demo-'))
    try {
      loading.end(
        `${model.info.architecture}, ${model.info.layout.layers} layers, context ${model.context}`,
      )
      const most = model.context - NEXT - 1
      const tokens = Math.min(whole('tokens', f.tokens, Math.min(2048, most), 1), most)
      const ids = await promptIds(model, f.text ?? TEXT, tokens)
      const recipes: DemoRecipe[] = []
      let text = ''
      let exact = true
      for (const recipe of RECIPES) {
        const child = (name: string) =>
          runPhase(
            [name, file, path.join(dir, recipe), recipe, f.text ?? TEXT, String(ids.length)],
            threads,
          )
        const written = (await child('write')) as Written
        const resumed = (await child('resume')) as Resumed
        const identical =
          written.digest === resumed.digest && String(written.next) === String(resumed.next)
        // The text once more, in halves: how the coded first half changes what is predicted in the second.
        const bar = progress(`${recipe}: measuring the error`)
        const chunk = Math.min(ids.length - (ids.length % 2), 1024)
        const e = await model.evaluate(ids, {
          ...parseRecipe(recipe),
          chunk,
          chunks: 1,
          prefix: chunk / 2,
          onProgress: bar.onProgress,
        })
        bar.end(`KL ${e.kl.toFixed(5)} nats over ${e.tokens} ids`)
        recipes.push({
          recipe,
          bytesPer1kTokens: Math.round((1000 * written.bytesHeld) / written.tokens),
          prefillMs: written.prefillMs,
          resumeMs: resumed.resumeMs,
          reused: resumed.reused,
          computed: resumed.computed,
          identical,
          kl: e.kl,
          perplexityRatio: e.perplexity / e.densePerplexity,
        })
        if (resumed.reused === 0)
          note(`${recipe}: FAILED, the resume reused nothing (${resumed.why})`)
        if (recipe === 'f16') {
          text = resumed.text
          exact = identical
          if (!identical) note('f16: FAILED, the resumed session is not the one that was committed')
        }
      }
      const ok = exact && recipes.every((r) => r.reused > 0)
      if (f.json) {
        printJson({
          model: file,
          tokens: ids.length,
          prefillMs: recipes[0]?.prefillMs,
          recipes,
          text,
        })
        return ok ? 0 : 1
      }
      process.stdout.write(
        `\n… ${JSON.stringify(text)}\n(${NEXT} greedy ids, written by a process that never read the ${ids.length} ids before them)\n\n`,
      )
      process.stdout.write(
        table(
          [
            'recipe',
            'KB per 1K tokens',
            'prefill ms',
            'resume ms',
            'faster',
            'reused',
            'computed',
            'KL (nats)',
            'perplexity',
            'identical',
          ],
          recipes.map((r) => [
            r.recipe,
            digits(r.bytesPer1kTokens / 1000),
            digits(r.prefillMs),
            digits(r.resumeMs),
            `${digits(r.prefillMs / r.resumeMs, 2)}×`,
            String(r.reused),
            String(r.computed),
            r.kl.toFixed(5),
            `×${r.perplexityRatio.toFixed(4)}`,
            r.identical ? 'yes' : 'NO',
          ]),
        ),
      )
      return ok ? 0 : 1
    } finally {
      await model.close()
      await rm(dir, { recursive: true, force: true })
    }
  },
}

async function promptIds(model: Model, file: string, tokens: number): Promise<Uint32Array> {
  const text = await readFile(file, 'utf8').catch((error: Error) => {
    throw new CacheError('Io', `${file}: ${error.message}`, { path: file }, error)
  })
  // An id is at least one character in any text that is worth a demo.
  const ids = (await model.tokenizer.encode(text.slice(0, 16 * tokens))).slice(0, tokens)
  if (ids.length < 128)
    throw new CacheError('InvalidArgument', `text: expected at least 128 ids, got ${ids.length}`, {
      field: 'text',
    })
  return ids
}

/** Runs a phase in a process of its own; its stderr is ours. */
function runPhase(
  [name, file, dir, recipe, text, tokens]: readonly string[],
  threads: { threads?: number },
): Promise<unknown> {
  const script = process.argv[1] as string
  const args = [
    script,
    'demo',
    '--phase',
    name,
    '--model',
    file,
    '--dir',
    dir,
    '--recipe',
    recipe,
    '--text',
    text,
    '--tokens',
    tokens,
  ] as string[]
  if (threads.threads !== undefined) args.push('--threads', String(threads.threads))
  return new Promise((resolve, reject) => {
    const child = spawn(process.execPath, [...process.execArgv, ...args], {
      stdio: ['ignore', 'pipe', 'inherit'],
    })
    let out = ''
    child.stdout.setEncoding('utf8').on('data', (chunk: string) => {
      out += chunk
    })
    child.on('error', reject)
    child.on('close', (code, signal) => {
      if (code === 0) resolve(JSON.parse(out))
      else
        reject(
          new CacheError(
            'Internal',
            `the ${name} process of the demo ended with ${signal ?? code}`,
          ),
        )
    })
  })
}

async function phase(
  name: string,
  file: string,
  dir: string,
  recipe: string,
  text: string,
  tokens: number,
  threads: { threads?: number },
): Promise<number> {
  const model = await Model.load(file, threads)
  const store = await openStore({ dir })
  const options = { tenant: TENANT, model, ...parseRecipe(recipe) }
  try {
    if (name === 'write') {
      const ids = await promptIds(model, text, tokens)
      const session = await store.open(options)
      const bar = progress(`${recipe}: prefilling ${ids.length} ids`)
      const from = performance.now()
      await session.prefill(ids, { onProgress: bar.onProgress })
      const prefillMs = performance.now() - from
      bar.end(`${digits(prefillMs)} ms`)
      const commit = await session.commit('demo')
      note(
        `${recipe}: committed ${commit.tokens} ids, ${digits(commit.bytesWritten / 1e6)} MB on disk; the process ends`,
      )
      const { bytesHeld } = session.report()
      const digest = await session.digest()
      const next = await continueGreedy(session)
      printJson({ prefillMs, bytesHeld, tokens: ids.length, digest, next } satisfies Written)
      await session.close()
    } else if (name === 'resume') {
      const from = performance.now()
      const session = await store.resume('demo', options)
      const resumeMs = performance.now() - from
      const opened = session.opened
      note(
        `${recipe}: a new process resumed it in ${digits(resumeMs)} ms (${opened?.reused ?? 0} reused, ${opened?.computed ?? 0} computed)`,
      )
      const digest = await session.digest()
      const next = await continueGreedy(session)
      const { reused = 0, computed = 0, why = '' } = opened ?? {}
      printJson({
        resumeMs,
        reused,
        computed,
        why,
        digest,
        next,
        text: model.tokenizer.decode(next, { continues: true }),
      } satisfies Resumed)
      await session.close()
    } else {
      throw new UsageError(`--phase: unknown phase ${name}`)
    }
    return 0
  } finally {
    await store.close()
    await model.close()
  }
}

/** The next greedy ids; stop ids are taken like any other, so that both processes give the same number. */
async function continueGreedy(session: Session): Promise<number[]> {
  const ids: number[] = []
  for await (const token of session.generate({ maxTokens: NEXT, stopIds: [] }))
    if (token.id !== null) ids.push(token.id)
  return ids
}
