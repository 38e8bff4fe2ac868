/** `kvasir doctor`: what works on this machine and why the rest does not. Needs no native file. */

import { existsSync } from 'node:fs'
import { cpus, totalmem } from 'node:os'
import { type BackendInfo, backendInfo } from '../info.js'
import { nativeStatus } from '../native.js'
import { type Command, cacheDir, flags, modelFile, printJson } from './shared.js'

export const doctor: Command = {
  summary: 'what works on this machine, and what to do about the rest',
  help: '  --json   one object. Exit status 1 if the native file cannot be loaded.',
  async run(args) {
    const { json } = flags(args, { json: { type: 'boolean' } })
    const found = nativeStatus()
    let backend: BackendInfo | null = null
    let backendError: string | null = null
    try {
      if (found.binding) backend = backendInfo()
    } catch (error) {
      backendError = (error as Error).message
    }
    let model: string | null = null
    try {
      model = modelFile(undefined)
    } catch {
      // Not an ailment: most installations name their own model.
    }
    const ok = found.binding !== null && backendError === null
    const report = {
      ok,
      version: found.version,
      node: process.version,
      platform: found.platform,
      cpu: cpus()[0]?.model.trim() ?? 'unknown',
      cores: cpus().length,
      memoryBytes: totalmem(),
      native: { loaded: found.binding !== null, path: found.path, tried: found.tried },
      backend,
      backendError,
      cacheDir: cacheDir(),
      cacheDirExists: existsSync(cacheDir()),
      demoModel: model,
    }
    if (json) {
      printJson(report)
      return ok ? 0 : 1
    }
    const lines = [
      `kvasir ${report.version}, Node ${report.node}, ${report.platform}`,
      `cpu      ${report.cpu}, ${report.cores} cores, ${(report.memoryBytes / 2 ** 30).toFixed(1)} GiB`,
      `native   ${found.path ?? 'NOT LOADED'}`,
      ...found.tried.map((t) => `  tried  ${t.path}: ${t.why}`),
      ...(backend
        ? [
            `backend  ${backend.backend}, kernels ${backend.isa} (this CPU could use ${backend.available.join(', ')}), ${backend.threads} threads`,
          ]
        : []),
      ...(backendError ? [`backend  ${backendError}`] : []),
      `model    ${model ?? 'none fetched: pass --model to demo, chat and eval'}`,
      ok
        ? 'everything works'
        : 'NOT usable: the native file must load. Reinstall with optional dependencies, or build it from source (README).',
    ]
    process.stdout.write(`${lines.join('\n')}\n`)
    return ok ? 0 : 1
  },
}
