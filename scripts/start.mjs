/** `npm start`: set up what is missing, then the main job on a really trained model. Arguments go on to `kvasir demo`. */

import { spawnSync } from 'node:child_process'
import path from 'node:path'
import { root, say, timesLine } from './lib/repo.mjs'
import { setup } from './setup.mjs'

const model = await setup()
say(`set up: ${timesLine()}`)
let args = process.argv.slice(2)
if (!args.includes('--model')) {
  if (model.missing) {
    say(`SmolLM2 is not here: ${model.missing}`)
    say(
      'running the exactness part on the small model of the repository instead (260K parameters: its speed says nothing)',
    )
  }
  args = ['--model', model.path ?? path.join(root, 'testdata/models/stories260K-f32.gguf'), ...args]
}
const demo = spawnSync(process.execPath, [path.join(root, 'dist/cli.js'), 'demo', ...args], {
  stdio: 'inherit',
})
process.exit(demo.status ?? 1)
