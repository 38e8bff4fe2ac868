/** The command line: `kvasir demo | chat | eval | methods | doctor | bench`, each with `--json`. */

import { CacheError } from '../errors.js'
import { nativeStatus } from '../native.js'
import { bench } from './bench.js'
import { chat } from './chat.js'
import { demo } from './demo.js'
import { doctor } from './doctor.js'
import { evaluate } from './eval.js'
import { methodList } from './methods.js'
import { type Command, UsageError } from './shared.js'

const COMMANDS: Readonly<Record<string, Command>> = {
  demo,
  chat,
  eval: evaluate,
  methods: methodList,
  doctor,
  bench,
}

function usage(): string {
  const lines = Object.entries(COMMANDS).map(
    ([name, c]) => `  kvasir ${name.padEnd(8)} ${c.summary}`,
  )
  return `kvasir ${nativeStatus().version}\n\n${lines.join('\n')}\n\nkvasir COMMAND --help shows its options. Every command takes --json.\n`
}

async function main(argv: readonly string[]): Promise<number> {
  const [name, ...args] = argv
  if (name === undefined || name === '--help' || name === '-h' || name === 'help') {
    process.stdout.write(usage())
    return name === undefined ? 2 : 0
  }
  if (name === '--version' || name === '-v') {
    process.stdout.write(`${nativeStatus().version}\n`)
    return 0
  }
  const command = Object.hasOwn(COMMANDS, name) ? COMMANDS[name] : undefined
  if (!command) throw new UsageError(`unknown command ${JSON.stringify(name)}\n\n${usage()}`)
  if (args.includes('--help') || args.includes('-h')) {
    process.stdout.write(`kvasir ${name}: ${command.summary}\n\n${command.help}\n`)
    return 0
  }
  return command.run(args)
}

main(process.argv.slice(2)).then(
  (code) => {
    process.exitCode = code
  },
  (error: unknown) => {
    const usageError = error instanceof UsageError
    const text =
      error instanceof CacheError
        ? `${error.code}: ${error.message}`
        : usageError
          ? error.message
          : String((error as Error)?.stack ?? error)
    process.stderr.write(`kvasir: ${text}\n`)
    process.exitCode = usageError ? 2 : 1
  },
)
