// Checks .github/workflows: each file is YAML; rights are named and minimal; every action has a version; every job has a limit.

import { readdirSync, readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parse } from 'yaml'

const dir = join(dirname(fileURLToPath(import.meta.url)), '..', '.github', 'workflows')
const files = readdirSync(dir).filter((f) => /\.ya?ml$/.test(f))
const problems = files.length > 0 ? [] : ['no workflows']

for (const file of files) {
  const text = readFileSync(join(dir, file), 'utf8')
  let workflow
  try {
    workflow = parse(text, { strict: true, uniqueKeys: true })
  } catch (error) {
    problems.push(`${file}: ${error.message}`)
    continue
  }
  if (workflow.on === undefined) problems.push(`${file}: no trigger`)
  if (workflow.permissions?.contents !== 'read')
    problems.push(`${file}: permissions must start from contents: read`)
  for (const [name, job] of Object.entries(workflow.jobs ?? {})) {
    const at = `${file}: job ${name}`
    for (const need of [job.needs ?? []].flat()) {
      if (!(need in workflow.jobs)) problems.push(`${at}: needs ${need}, which does not exist`)
    }
    if (typeof job['timeout-minutes'] !== 'number') problems.push(`${at}: no timeout-minutes`)
    for (const step of job.steps ?? []) {
      if (step.uses === undefined && step.run === undefined)
        problems.push(`${at}: a step does nothing`)
      if (step.uses !== undefined && !/^[\w.-]+\/[\w./-]+@(v\d+|[0-9a-f]{40})/.test(step.uses)) {
        problems.push(`${at}: ${step.uses} is not pinned`)
      }
      if (/\$\{\{\s*github\.event\.(issue|pull_request|comment|head_commit)/.test(step.run ?? '')) {
        problems.push(`${at}: text of strangers inside a shell command`)
      }
    }
  }
}

for (const p of problems) console.error(`workflows: ${p}`)
console.log(`workflows: ${files.length} files, ${problems.length} problems`)
process.exit(problems.length > 0 ? 1 : 0)
