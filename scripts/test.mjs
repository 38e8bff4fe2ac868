/** `npm test`: set up what is missing, then every test. A missing real model is a notice here and a failure in CI. */

import path from 'node:path'
import { fail, root, run, say, stage, timesLine } from './lib/repo.mjs'
import { setup } from './setup.mjs'

const model = await setup()
if (model.missing) {
  if (process.env.CI) fail(`the real model is needed in CI: ${model.missing}`)
  say(`SmolLM2 is not here: ${model.missing}. Its tests are left out; every other test runs.`)
} else {
  // The Rust tests on real weights look here.
  process.env.KVASIR_SMOLLM2 = model.path
}
await stage('cargo test', () =>
  run('cargo', ['test', '--release', '--locked', '--workspace'], { stdout: 'inherit' }),
)
const vitest = path.join(root, 'node_modules/vitest/vitest.mjs')
await stage('vitest', () =>
  run(process.execPath, [vitest, 'run', ...process.argv.slice(2)], { stdout: 'inherit' }),
)
say(`passed. ${timesLine()}${model.missing ? ' (without the real model)' : ''}`)
