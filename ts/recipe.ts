/** Recipes: which policies work on a session, in order of effect, as plain JSON. */

import { invalid } from './errors.js'

/** One policy and its options. Made by the factories of `kvasir/policies`; any `{ use, … }` object will do. */
export interface Step {
  /** Slug of the method; `kvasir methods` lists them. */
  readonly use: string
  /** Options of the method; those left out keep their default. */
  readonly [option: string]: unknown
}

/** Options that every policy takes. */
export interface PolicyOptions {
  /**
   * Largest relative error of the attention output that one op of this policy may cause; ops above it are refused and counted.
   * Measured over the last few real queries. Default: none.
   */
  readonly floor?: number
}

/** A composition of policies. Its hash is part of the name of every row computed under it. */
export type Recipe = readonly Step[]

/** How dense rows are kept. */
export type KvDtype = 'f16' | 'f32' | 'bf16'

const DTYPES: readonly string[] = ['f16', 'f32', 'bf16'] satisfies KvDtype[]

/** Composes policies. The engine checks every option when a session is opened. */
export function recipe(steps: readonly Step[]): Recipe {
  if (!Array.isArray(steps)) throw invalid('recipe', 'a list of policies', steps)
  for (const [i, step] of steps.entries()) {
    if (typeof step !== 'object' || step === null || typeof (step as Step).use !== 'string') {
      throw invalid(`recipe[${i}]`, 'an object with the slug of a method as `use`', step)
    }
  }
  return Object.freeze(steps.map((s: Step) => Object.freeze({ ...s })))
}

/** One policy without the options that were left out. @internal */
export function step(use: string, options: object): Step {
  const given = Object.entries(options).filter(([, value]) => value !== undefined)
  return Object.freeze({ ...Object.fromEntries(given), use })
}

/**
 * A recipe as the command line writes it: `f16`, `int8`, `bf16+int8`, `streaming-llm:sinks=4,recent=252`, or JSON.
 * Parts are joined by `+`; a dtype says how dense rows are kept. @internal
 */
export function parseRecipe(text: string): { readonly kv: KvDtype; readonly recipe: Recipe } {
  if (text.trimStart().startsWith('[')) {
    try {
      return { kv: 'f16', recipe: recipe(JSON.parse(text) as Step[]) }
    } catch (error) {
      if (error instanceof SyntaxError) throw invalid('recipe', 'JSON', text)
      throw error
    }
  }
  let kv: KvDtype = 'f16'
  const steps: Step[] = []
  for (const part of text.split('+')) {
    if (DTYPES.includes(part)) {
      kv = part as KvDtype
      continue
    }
    const [use = '', list] = part.split(/:(.*)/s)
    if (!/^[a-z0-9-]+$/.test(use))
      throw invalid('recipe', 'f16, f32, bf16 or methods joined by +', text)
    const options: Record<string, unknown> = {}
    for (const pair of list ? list.split(',') : []) {
      const [name = '', value] = pair.split(/=(.*)/s)
      if (!name || value === undefined) throw invalid(`recipe.${use}`, 'option=value', pair)
      try {
        options[name] = JSON.parse(value)
      } catch {
        options[name] = value
      }
    }
    steps.push({ ...options, use })
  }
  return { kv, recipe: recipe(steps) }
}
