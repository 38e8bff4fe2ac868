/** `kvasir bench`: how fast attention reads each code on this machine, against what its memory can deliver. */

import { native, watched } from '../native.js'
import { type Command, digits, flags, printJson, progress, table, whole } from './shared.js'

interface Bench {
  readonly device: string
  readonly isa: string
  readonly threads: number
  readonly ceilingGBps: number
  readonly attention: readonly {
    readonly code: string
    readonly headDim: number
    readonly group: number
    readonly tokens: number
    readonly gbps: number
    readonly fractionOfCeiling: number
    readonly ratioToF16: number
  }[]
}

export const bench: Command = {
  summary: 'speed of attention over each code, against the memory of this machine',
  help: `  --quick       fewer sizes and repeats
  --threads N   default: one per core
  --json        { device, isa, threads, ceilingGBps, attention: [{ code, headDim, group, tokens, gbps, fractionOfCeiling, ratioToF16 }] };
                group = query heads per kv head, ratioToF16 = time of f16 over time of this code`,
  async run(args) {
    const f = flags(args, {
      json: { type: 'boolean' },
      quick: { type: 'boolean' },
      threads: { type: 'string' },
    })
    const threads = f.threads === undefined ? undefined : whole('threads', f.threads, 1, 1)
    const bar = progress('measuring')
    const options = JSON.stringify({ quick: f.quick ?? false, threads })
    const result = JSON.parse(
      await watched({ onProgress: bar.onProgress }, (cancel) => native().bench(options, cancel)),
    ) as Bench
    bar.end('done')
    if (f.json) {
      printJson(result)
      return 0
    }
    const rows = result.attention.map((a) => [
      a.code,
      String(a.headDim),
      String(a.group),
      String(a.tokens),
      digits(a.gbps),
      `${(100 * a.fractionOfCeiling).toFixed(0)} %`,
      digits(a.ratioToF16),
    ])
    process.stdout.write(
      `${result.device}, ${result.isa}, ${result.threads} threads: memory reads ${digits(result.ceilingGBps)} GB/s\n\n`,
    )
    process.stdout.write(
      table(['code', 'head dim', 'group', 'tokens', 'GB/s', 'of ceiling', 'speed vs f16'], rows),
    )
    return 0
  },
}
