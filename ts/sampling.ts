/** Choice of the next id. */

import { invalid } from './errors.js'
import type { NativeSampling } from './native.js'

/** How the next id is chosen. Greedy unless `temperature` is set. */
export interface SamplingOptions {
  /** Divides the logits; 0 (default) takes the most likely id. 0.7 to 1 for varied text. */
  readonly temperature?: number
  /** Only the k most likely ids; 0 (default) for all. */
  readonly topK?: number
  /** Only the most likely ids that hold this share of the probability, in (0, 1]. Default 1: all. */
  readonly topP?: number
  /** Start of the random numbers, 0 to 2^53 - 1. A draw depends on seed and position only, so a replay gives the same text. Default 0. */
  readonly seed?: number
}

/** Checked and in the form of the binding. @internal */
export function samplingJson(options: SamplingOptions): string {
  const { temperature = 0, topK = 0, topP = 1, seed = 0 } = options
  if (!(temperature >= 0) || !Number.isFinite(temperature))
    throw invalid('temperature', 'a number of 0 or more', temperature)
  if (!Number.isSafeInteger(topK) || topK < 0)
    throw invalid('topK', 'a whole number of 0 or more', topK)
  if (!(topP > 0 && topP <= 1)) throw invalid('topP', 'a share in (0, 1]', topP)
  if (!Number.isSafeInteger(seed) || seed < 0)
    throw invalid('seed', 'a whole number from 0 to 2^53 - 1', seed)
  return JSON.stringify({ temperature, topK, topP, seed } satisfies NativeSampling)
}
