/** `kvasir chat`: a conversation that survives restarts. Shows per turn what was reused, what was computed, and the time to the first token. */

import { mkdir, readFile, rename, writeFile } from 'node:fs/promises'
import path from 'node:path'
import { createInterface } from 'node:readline/promises'
import type { ChatMessage } from '../chat.js'
import { CacheError } from '../errors.js'
import { Model } from '../model.js'
import { parseRecipe } from '../recipe.js'
import type { Session } from '../session.js'
import { openStore, type Store } from '../store.js'
import {
  type Command,
  cacheDir,
  digits,
  flags,
  modelFile,
  note,
  printJson,
  UsageError,
  whole,
} from './shared.js'

/** One turn of the result. */
interface Turn {
  readonly user: string
  readonly text: string
  readonly reused: number
  readonly computed: number
  readonly ttftMs: number
  readonly tokens: number
  readonly finish: string
}

/** What is kept beside the store: the messages, and the text that the committed session stands for. */
interface Saved {
  readonly messages: readonly ChatMessage[]
  readonly rendered: string
}

export const chat: Command = {
  summary: 'a conversation that survives restarts',
  help: `  --model M       GGUF file or Hugging Face folder with a chat template
  --name N        name of the conversation (default: default)
  --dir D         where it is kept (default: in the cache folder)
  --message T     say T and end; may be given several times. Without it, reads lines from stdin
  --system T      system message of a new conversation
  --new           forget the conversation first
  --max-tokens N  per reply (default 256)
  --recipe R      as in \`kvasir eval\` (default f16)
  --temperature X, --seed N, --threads N
  --json          an array of { user, text, reused, computed, ttftMs, tokens, finish }`,
  async run(args) {
    const f = flags(args, {
      json: { type: 'boolean' },
      model: { type: 'string' },
      name: { type: 'string' },
      dir: { type: 'string' },
      message: { type: 'string', multiple: true },
      system: { type: 'string' },
      new: { type: 'boolean' },
      'max-tokens': { type: 'string' },
      recipe: { type: 'string' },
      temperature: { type: 'string' },
      seed: { type: 'string' },
      threads: { type: 'string' },
    })
    const name = f.name ?? 'default'
    if (!/^[\w.-]{1,64}$/.test(name))
      throw new UsageError('--name: expected 1 to 64 letters, digits, dots, dashes')
    const dir = f.dir ?? path.join(cacheDir(), 'chat')
    const maxTokens = whole('max-tokens', f['max-tokens'], 256, 1)
    const seed = whole('seed', f.seed, 0)
    const temperature = Number(f.temperature ?? 0)
    const threads = f.threads === undefined ? {} : { threads: whole('threads', f.threads, 1, 1) }
    const format = parseRecipe(f.recipe ?? 'f16')

    const model = await Model.load(modelFile(f.model), threads)
    const template = model.chat
    if (!template) {
      await model.close()
      throw new CacheError('Unsupported', 'chat: this model has no chat template')
    }
    await mkdir(dir, { recursive: true })
    const store = await openStore({ dir: path.join(dir, 'store') })
    // A tenant per conversation, so that `--new` can forget all of it.
    const tenant = `chat-${name}`
    const file = path.join(dir, `${name}.json`)
    const turns: Turn[] = []
    try {
      if (f.new) {
        await store.forget(tenant)
        await save(file, { messages: [], rendered: '' })
      }
      const options = { tenant, model, ...format }
      const saved = await load(file)
      let messages: ChatMessage[] = [...saved.messages]
      if (messages.length === 0 && f.system) messages.push({ role: 'system', content: f.system })
      let session = await reopen(store, name, options, saved.rendered !== '')
      let rendered = session.ids.length > 0 ? saved.rendered : ''
      // What the resume took from the store counts for the first turn of this process.
      let before = session.opened?.reused ?? 0
      let spent = session.opened?.ms ?? 0
      if (saved.messages.length > 0)
        note(
          `going on with ${saved.messages.length} messages (${before} ids resumed in ${digits(spent)} ms)`,
        )

      for await (const user of f.message ?? lines(f.json ?? false)) {
        const from = performance.now() - spent
        messages.push({ role: 'user', content: user })
        const full = template.render(messages)
        if (!full.startsWith(rendered)) {
          // The template wrote the past differently than it was spoken: start over; the store still has the common prefix.
          await session.close()
          session = await store.open(options)
          rendered = ''
          before = 0
        }
        // Role markers are read as tokens everywhere, also in what the user typed: this is a tool for one's own machine.
        const ids = await model.tokenizer.encode(full.slice(rendered.length), {
          special: true,
          lead: rendered === '',
        })
        const report = await session.prefill(ids)
        let text = ''
        let tokens = 0
        let ttftMs = 0
        const reply = session.generate({ maxTokens, temperature, seed })
        let step = await reply.next()
        ttftMs = performance.now() - from
        for (; !step.done; step = await reply.next()) {
          text += step.value.text
          if (step.value.id !== null) tokens++
          if (!f.json) process.stdout.write(step.value.text)
        }
        messages = [...messages, { role: 'assistant', content: text }]
        rendered = full + text
        await session.commit(name)
        await save(file, { messages, rendered })
        const turn: Turn = {
          user,
          text,
          reused: before + report.reused,
          computed: report.computed,
          ttftMs,
          tokens,
          finish: step.value as string,
        }
        turns.push(turn)
        if (!f.json) process.stdout.write('\n')
        note(
          `[${turn.reused} ids reused, ${turn.computed} computed, first token after ${digits(ttftMs)} ms]`,
        )
        before = session.ids.length
        spent = 0
      }
      await session.close()
      if (f.json) printJson(turns)
      return 0
    } finally {
      await store.close()
      await model.close()
    }
  },
}

/** The committed conversation, or an empty session where there is none that fits. */
async function reopen(
  store: Store,
  name: string,
  options: Parameters<Store['open']>[0],
  committed: boolean,
): Promise<Session> {
  if (!committed) return store.open(options)
  try {
    return await store.resume(name, options)
  } catch (error) {
    if (!(error instanceof CacheError) || !['NoSession', 'Mismatch'].includes(error.code))
      throw error
    note(`the stored conversation cannot be resumed (${error.message}): computing it anew`)
    return store.open(options)
  }
}

async function* lines(quiet: boolean): AsyncGenerator<string> {
  const input = createInterface({
    input: process.stdin,
    ...(quiet || !process.stdin.isTTY ? {} : { output: process.stderr, prompt: '> ' }),
  })
  input.prompt()
  for await (const line of input) {
    if (line.trim()) yield line.trim()
    input.prompt()
  }
}

async function load(file: string): Promise<Saved> {
  try {
    return JSON.parse(await readFile(file, 'utf8')) as Saved
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return { messages: [], rendered: '' }
    throw new CacheError('Malformed', `${file}: ${(error as Error).message}`, { path: file }, error)
  }
}

async function save(file: string, saved: Saved): Promise<void> {
  const next = `${file}.${process.pid}`
  await writeFile(next, `${JSON.stringify(saved, null, 1)}\n`)
  await rename(next, file)
}
