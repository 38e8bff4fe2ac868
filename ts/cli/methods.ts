/** `kvasir methods`: every registered method. */

import { methods } from '../info.js'
import { type Command, flags, printJson, table } from './shared.js'

export const methodList: Command = {
  summary: 'every registered method: slug, paper, group, taxonomy leaf, track',
  help: '  --json   an array of { slug, paper, group, leaf, track, summary, options }',
  async run(args) {
    const { json } = flags(args, { json: { type: 'boolean' } })
    const all = methods()
    if (json) printJson(all)
    else
      process.stdout.write(
        table(
          ['slug', 'group', 'leaf', 'track', 'paper'],
          all.map((m) => [m.slug, m.group, m.leaf, m.track, m.paper]),
        ),
      )
    return 0
  },
}
