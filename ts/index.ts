/** kvasir: the feature cache for transformer inference. */

export type { ChatMessage, ChatTemplate } from './chat.js'
export { CacheError, type CacheErrorCode } from './errors.js'
export {
  type BackendInfo,
  backendInfo,
  type MethodInfo,
  type MethodOption,
  methods,
} from './info.js'
export {
  type EvaluateOptions,
  type Evaluation,
  type Layout,
  type LoadOptions,
  Model,
  type ModelInfo,
} from './model.js'
export * from './policies/index.js'
export { type KvDtype, type PolicyOptions, type Recipe, recipe, type Step } from './recipe.js'
export type { SamplingOptions } from './sampling.js'
export type {
  CommitReport,
  FinishReason,
  GenerateOptions,
  Generation,
  Pass,
  Report,
  Rows,
  Session,
  SessionReport,
  Token,
  WatchOptions,
} from './session.js'
export {
  type Forgotten,
  openStore,
  type SessionOptions,
  type Store,
  type StoreOptions,
  type StoreStats,
} from './store.js'
export type { DecodeOptions, EncodeOptions, StreamDecoder, Tokenizer } from './tokenizer.js'
