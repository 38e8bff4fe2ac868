/** Factories of every method, generated from the registry by scripts/generate.mjs. Do not edit. */

import { type PolicyOptions, type Step, step } from '../recipe.js'

/** Rows kept per kv head, as a count or as a share of the rows seen, in (0, 1]. */
export type Budget = { readonly rows: number } | { readonly ratio: number }

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

/** Options of `streamingLlm`. */
export interface StreamingLlmOptions extends PolicyOptions {
  /** First rows that are always kept. Default: `4`. */
  readonly sinks?: number
  /** Most recent rows that are kept. Default: `1020`. */
  readonly recent?: number
  /**
   * Rows above `sinks + recent` that are tolerated before the next plan; more means fewer compactions. Default:
   * `0`.
   */
  readonly slackRows?: number
  /**
   * Position of a kept row: the one it was computed at, or its index among the kept rows (`packed`, which stores
   * keys before RoPE). Choose `packed` for streams longer than the model's context. Default: `"original"`.
   */
  readonly positions?: 'original' | 'packed'
}

/**
 * StreamingLLM: keep the first rows (attention sinks) and the most recent ones. Xiao et al., "Efficient
 * Streaming Language Models with Attention Sinks", ICLR 2024, arXiv 2309.17453.
 */
export function streamingLlm(options: StreamingLlmOptions = {}): Step {
  return step('streaming-llm', options)
}

/** Options of `tova`. */
export interface TovaOptions extends PolicyOptions {
  /** Rows kept per kv head, as a count or as a share of the rows seen. Default: `{"rows":1024}`. */
  readonly budget?: Budget
  /** Rows above the budget that are tolerated before the next plan; more means fewer compactions. Default: `0`. */
  readonly slackRows?: number
  /** Always keep the newest row, whatever it scored. Default: `true`. */
  readonly keepLast?: boolean
}

/**
 * TOVA: keep the rows that the newest query attends to most. Oren et al., "Transformers are Multi-State RNNs",
 * EMNLP 2024, arXiv 2401.06104.
 */
export function tova(options: TovaOptions = {}): Step {
  return step('tova', options)
}
