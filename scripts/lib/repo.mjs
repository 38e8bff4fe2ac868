/** Paths and child processes of the repository's scripts. Plain Node: these run before anything is installed. */

import { spawnSync } from 'node:child_process'
import path from 'node:path'
import { fileURLToPath } from 'node:url'

/** The checkout. */
export const root = path.resolve(fileURLToPath(new URL('../..', import.meta.url)))

/** A line of progress; stdout belongs to results. */
export function say(line) {
  process.stderr.write(`kvasir: ${line}\n`)
}

/** Says what is wrong and what to do, and ends the process. */
export function fail(line) {
  say(line)
  process.exit(1)
}

/** Runs a command in the checkout and ends the process if it fails. Its stdout goes to our stderr unless `stdout` is inherited. */
export function run(command, args, options = {}) {
  const { stdout = 2, ...rest } = options
  // Windows finds npm and npx only through the shell.
  const shell = process.platform === 'win32' && /^(npm|npx)$/.test(command)
  const done = spawnSync(command, args, {
    cwd: root,
    stdio: ['inherit', stdout, 'inherit'],
    shell,
    ...rest,
  })
  if (done.error) fail(`${command} could not be started: ${done.error.message}`)
  if (done.status !== 0)
    fail(`\`${command} ${args.join(' ')}\` failed${done.signal ? ` (${done.signal})` : ''}`)
}

/** How long each stage took, for the summary at the end. */
export const times = []

/** Runs one stage and notes its time. */
export async function stage(name, work) {
  const from = performance.now()
  const out = await work()
  times.push([name, (performance.now() - from) / 1000])
  return out
}

/** The times, one line. */
export function timesLine() {
  return times.map(([name, s]) => `${name} ${s.toFixed(1)} s`).join(', ')
}
