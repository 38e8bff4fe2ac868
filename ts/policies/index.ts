/** Factories of every method, generated from the registry by scripts/generate.mjs. Do not edit. */

import { type PolicyOptions, type Step, step } from '../recipe.js'

/** Options of `int8`. */
export interface Int8Options extends PolicyOptions {
  /**
   * First rows of the session that stay exact (attention sinks), at most one tile of 32. 0 codes every row.
   * Default: `4`.
   */
  readonly sinkRows?: number
}

/**
 * int8: dense rows in 8 bits, the strongest simple baseline. common practice; absmax scaling of rows as in
 * Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", NeurIPS 2022, arXiv
 * 2208.07339.
 */
export function int8(options: Int8Options = {}): Step {
  return step('int8', options)
}
