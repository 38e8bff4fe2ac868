/** Before any test: where the real model is, so that a missing one is a failure with advice and not a skipped test. */

import { existsSync } from 'node:fs'
import type { TestProject } from 'vitest/node'
import { modelPath } from '../scripts/lib/model.mjs'

declare module 'vitest' {
  export interface ProvidedContext {
    smollm: string | null
  }
}

export default function setup(project: TestProject): void {
  const path = modelPath()
  const found = existsSync(path)
  if (!found && process.env['CI'])
    throw new Error(`the real model is missing: ${path} (run \`npm run setup\`)`)
  project.provide('smollm', found ? path : null)
}
